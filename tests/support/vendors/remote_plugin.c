/* A plug-in of the 2022 series as its authors meant it: every operation is a request to a server at the device, in the
 * protocol of their example. ARG is the port of that server on this host. Notes init and cleanup in $PLUGIN_LOG.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "plugin.h"

enum { UPDATE_PENDING = 1, SET_STATE, GET_STATE, SAVE_BUFFER, LOAD_BUFFER, MESSAGE_REPLY, FINISH };

struct header {
    uint32_t request, size;
    uint64_t value;
};

struct device {
    int sock;
};

static void note(const char *what, const char *device)
{
    const char *path = getenv("PLUGIN_LOG");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (log) {
        fprintf(log, "%s %s %d\n", what, device, (int)getpid());
        fclose(log);
    }
}

static int put(struct device *device, const void *data, uint64_t size)
{
    const char *at = data;
    while (size) {
        ssize_t sent = send(device->sock, at, size, MSG_NOSIGNAL);
        if (sent <= 0)
            return -EPIPE;
        at += sent;
        size -= (uint64_t)sent;
    }
    return 0;
}

static int take(struct device *device, void *data, uint64_t size)
{
    char *at = data;
    while (size) {
        ssize_t got = recv(device->sock, at, size, 0);
        if (got <= 0)
            return -EPIPE;
        at += got;
        size -= (uint64_t)got;
    }
    return 0;
}

static int request(struct device *device, uint32_t what, uint64_t size, uint64_t value)
{
    struct header header = { what, (uint32_t)size, value };
    return put(device, &header, sizeof header);
}

static int ask(struct device *device, uint32_t what, uint64_t *value)
{
    struct header header;
    if (request(device, what, 0, 0) || take(device, &header, sizeof header))
        return -EPIPE;
    if (header.request != MESSAGE_REPLY || header.size != sizeof *value)
        return -EPROTO;
    *value = header.value;
    return 0;
}

static void *plugin_init(char *devid, char *arg)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arg)) };
    struct device *device = calloc(1, sizeof *device);
    note("init", devid);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    device->sock = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(device->sock, (struct sockaddr *)&address, sizeof address)) {
        close(device->sock);
        free(device);
        return NULL;
    }
    return device;
}

static int plugin_save(void *handle, uint8_t *state, uint64_t len)
{
    int failed = request(handle, SAVE_BUFFER, len, 0);
    return failed ? failed : take(handle, state, len);
}

static int plugin_load(void *handle, uint8_t *state, uint64_t len)
{
    int failed = request(handle, LOAD_BUFFER, len, 0);
    return failed ? failed : put(handle, state, len);
}

static int plugin_update_pending(void *handle, uint64_t *pending_bytes)
{
    return ask(handle, UPDATE_PENDING, pending_bytes);
}

static int plugin_set_state(void *handle, uint32_t value)
{
    return request(handle, SET_STATE, sizeof(uint64_t), value);
}

static int plugin_get_state(void *handle, uint32_t *value)
{
    uint64_t wide = 0;
    int failed = ask(handle, GET_STATE, &wide);
    *value = (uint32_t)wide;
    return failed;
}

static int plugin_cleanup(void *handle)
{
    struct device *device = handle;
    request(device, FINISH, 0, 0);
    close(device->sock);
    free(device);
    note("cleanup", "-");
    return 0;
}

static struct plugin_ops ops = {
    plugin_init, plugin_save, plugin_load, plugin_update_pending, plugin_set_state, plugin_get_state, plugin_cleanup,
};

int vfio_lm_get_plugin_version(void)
{
    return 0;
}

void *vfio_lm_get_plugin_ops(void)
{
    return &ops;
}
