/* What a plug-in of the 2022 series offers, as include/hw/vfio/vfio-migration-plugin.h of that series declares it. */
#include <stdint.h>

struct plugin_ops {
    void *(*init)(char *devid, char *arg);
    int (*save)(void *handle, uint8_t *state, uint64_t len);
    int (*load)(void *handle, uint8_t *state, uint64_t len);
    int (*update_pending)(void *handle, uint64_t *pending_bytes);
    int (*set_state)(void *handle, uint32_t value);
    int (*get_state)(void *handle, uint32_t *value);
    int (*cleanup)(void *handle);
};
