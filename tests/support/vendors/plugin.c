/* A plug-in of the 2022 series whose device is files: ARG.state, ARG.content, ARG.loading.
 *
 * As it stands it behaves well. -DON_<OP>=<statement> makes an operation misbehave first; -DVERSION, -DNO_VERSION,
 * -DNO_OPS, -DNULL_OPS, -DNO_LOAD, -DNO_CLEANUP and -DON_LOADING change what the library exports or does when it is loaded.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "plugin.h"

#ifndef ON_INIT
#define ON_INIT
#endif
#ifndef ON_SAVE
#define ON_SAVE
#endif
#ifndef ON_LOAD
#define ON_LOAD
#endif
#ifndef ON_PENDING
#define ON_PENDING
#endif
#ifndef ON_SET
#define ON_SET
#endif
#ifndef ON_GET
#define ON_GET
#endif
#ifndef ON_CLEANUP
#define ON_CLEANUP
#endif
#ifndef VERSION
#define VERSION 0
#endif

enum { RUNNING = 1, SAVING = 2, RESUMING = 4 };

struct device {
    char path[200];
    char arg[200];
    uint64_t offset;
};

static void spin(void)
{
    for (;;) {
    }
}

static const char *file_name(struct device *device, const char *name)
{
    snprintf(device->path, sizeof device->path, "%s.%s", device->arg, name);
    return device->path;
}

static FILE *file(struct device *device, const char *name, const char *mode)
{
    return fopen(file_name(device, name), mode);
}

static uint32_t read_state(struct device *device)
{
    unsigned state = RUNNING;
    FILE *f = file(device, "state", "r");
    if (f) {
        if (fscanf(f, "%u", &state) != 1)
            state = 6;
        fclose(f);
    }
    return state;
}

static void note(struct device *device, const char *what)
{
    FILE *f = file(device, "log", "a");
    if (f) {
        fprintf(f, "%s\n", what);
        fclose(f);
    }
}

static void *plugin_init(char *devid, char *arg)
{
    struct device *device = calloc(1, sizeof *device);
    ON_INIT;
    if (!device || strlen(arg) > 150)
        return NULL;
    strcpy(device->arg, arg);
    note(device, "init");
    note(device, devid);
    return device;
}

static uint64_t size_of(struct device *device)
{
    FILE *f = file(device, "content", "r");
    long size = 0;
    if (f) {
        fseek(f, 0, SEEK_END);
        size = ftell(f);
        fclose(f);
    }
    return (uint64_t)size;
}

static int plugin_save(void *handle, uint8_t *state, uint64_t len)
{
    struct device *device = handle;
    FILE *f = file(device, "content", "r");
    size_t got;
    ON_SAVE;
    if (!f)
        return -EIO;
    fseek(f, (long)device->offset, SEEK_SET);
    got = fread(state, 1, len, f);
    fclose(f);
    device->offset += got;
    return got == len ? 0 : -EINVAL;
}

static int plugin_load(void *handle, uint8_t *state, uint64_t len)
{
    struct device *device = handle;
    FILE *f = file(device, "loading", "a");
    size_t put;
    ON_LOAD;
    if (!f)
        return -EIO;
    put = fwrite(state, 1, len, f);
    return fclose(f) || put != len ? -EIO : 0;
}

static int plugin_update_pending(void *handle, uint64_t *pending_bytes)
{
    struct device *device = handle;
    ON_PENDING;
    *pending_bytes = read_state(device) == SAVING ? size_of(device) - device->offset : 0;
    return 0;
}

static int plugin_set_state(void *handle, uint32_t value)
{
    struct device *device = handle;
    char from[220];
    FILE *f;
    ON_SET;
    if (value == SAVING)
        device->offset = 0;
    snprintf(from, sizeof from, "%s.loading", device->arg);
    if (value == RESUMING)
        unlink(from);
    if (value == RUNNING && read_state(device) == RESUMING) {
        char to[220];
        snprintf(to, sizeof to, "%s.content", device->arg);
        if (rename(from, to))
            return -errno;
    }
    /* All at once: the process may be killed at any moment, and a device's state is never half of one. */
    f = file(device, "state.new", "w");
    if (!f)
        return -EIO;
    fprintf(f, "%u", value);
    if (fclose(f))
        return -EIO;
    snprintf(from, sizeof from, "%s.state.new", device->arg);
    return rename(from, file_name(device, "state")) ? -errno : 0;
}

static int plugin_get_state(void *handle, uint32_t *value)
{
    ON_GET;
    *value = read_state(handle);
    return 0;
}

static int plugin_cleanup(void *handle)
{
    ON_CLEANUP;
    note(handle, "cleanup");
    free(handle);
    return 0;
}

static struct plugin_ops ops = {
    .init = plugin_init,
    .save = plugin_save,
#ifndef NO_LOAD
    .load = plugin_load,
#endif
    .update_pending = plugin_update_pending,
    .set_state = plugin_set_state,
    .get_state = plugin_get_state,
#ifndef NO_CLEANUP
    .cleanup = plugin_cleanup,
#endif
};

#ifndef NO_VERSION
int vfio_lm_get_plugin_version(void)
{
    return VERSION;
}
#endif

#ifndef NO_OPS
void *vfio_lm_get_plugin_ops(void)
{
#ifdef NULL_OPS
    return NULL;
#else
    return &ops;
#endif
}
#endif

__attribute__((constructor)) static void loading(void)
{
    (void)spin;
    (void)plugin_cleanup;
    (void)ops;
#ifdef ON_LOADING
    ON_LOADING;
#endif
}
