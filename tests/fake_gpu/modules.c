/* PTX is read as far as a driver has to read it for launching: versions, entries and the sizes of their parameters. What a kernel
   does is in libcoldstart_emulation.so, which lies beside this library. */
#include "driver.h"
#include <ctype.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

static int ptx_of_driver(void) { /* the newest PTX that a driver of this CUDA version reads, 87 for 8.7 */
    static const int known[][2] = {{13000, 90}, {12090, 88}, {12080, 87}, {12070, 86}, {12050, 85}, {12040, 84}, {12030, 83},
                                   {12020, 82}, {12010, 81}, {12000, 80}, {11080, 78}, {11070, 77}, {11060, 76}, {11050, 75}};
    for (size_t n = 0; n < sizeof known / sizeof *known; n++)
        if (settings.driver_version >= known[n][0]) return known[n][1];
    return 74;
}

static size_t size_of_type(const char *type) { /* ".u64", ".f32", ".b8", ".pred" */
    int bits = atoi(type + 2);
    return bits >= 8 ? (size_t)bits / 8 : 0;
}

/* One parameter: `.param [.align n] .type [.ptr ...] name[count]`. Returns 0 where it is malformed. */
static size_t size_of_parameter(const char *text, const char *end) {
    static const char *const types[] = {".u8", ".u16", ".u32", ".u64", ".s8", ".s16", ".s32", ".s64", ".b8", ".b16",
                                        ".b32", ".b64", ".f16", ".f32", ".f64"};
    size_t bytes = 0;
    for (const char *at = text; at < end && !bytes; at++)
        for (size_t n = 0; *at == '.' && n < sizeof types / sizeof *types; n++) {
            size_t length = strlen(types[n]);
            if (strncmp(at, types[n], length) == 0 && !isalnum((unsigned char)at[length])) bytes = size_of_type(types[n]);
        }
    const char *bracket = memchr(text, '[', (size_t)(end - text));
    return bracket ? bytes * (size_t)atoi(bracket + 1) : bytes;
}

static CUresult parse_parameters(const char *open, const char *close, function *into) {
    for (const char *at = open; (at = strstr(at, ".param")) && at < close;) {
        const char *end = memchr(at, ',', (size_t)(close - at));
        if (!end) end = close;
        size_t bytes = size_of_parameter(at, end);
        if (!bytes || into->parameter_count == MAX_ARGUMENTS) return CUDA_ERROR_INVALID_PTX;
        into->parameter_bytes[into->parameter_count++] = bytes;
        at = end;
    }
    return CUDA_SUCCESS;
}

static CUresult check_versions(const char *text) {
    const char *version = strstr(text, ".version"), *target = strstr(text, ".target");
    int major, minor, architecture;
    if (!version || sscanf(version, ".version %d.%d", &major, &minor) != 2) return CUDA_ERROR_INVALID_PTX;
    if (!target || sscanf(target, ".target sm_%d", &architecture) != 1) return CUDA_ERROR_INVALID_PTX;
    if (major * 10 + minor > ptx_of_driver()) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    return architecture > 90 ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
}

CUresult parse_ptx(const char *text, module *into, function **found, int *found_count) {
    if (strncmp(text, "//", 2) != 0 && strncmp(text, ".version", 8) != 0) return CUDA_ERROR_INVALID_IMAGE;
    CUresult code = check_versions(text);
    *found_count = 0;
    for (const char *at = text; !code && (at = strstr(at, ".entry"));) {
        function *made = calloc(1, sizeof *made);
        at += strlen(".entry");
        const char *brace = strchr(at, '{'), *open = strchr(at, '('), *close = open ? strchr(open, ')') : NULL;
        if (!brace || sscanf(at, " %127[A-Za-z0-9_$%]", made->name) != 1 || *found_count == 64) code = CUDA_ERROR_INVALID_PTX;
        else if (open && open < brace) code = close ? parse_parameters(open, close, made) : CUDA_ERROR_INVALID_PTX;
        made->module = into;
        found[(*found_count)++] = made;
    }
    return code;
}

static emulator found_emulator; /* found once: the same for whichever thread comes first */

void forget_emulator(void) { found_emulator = NULL; }

emulator find_emulator(void) {
    Dl_info mine;
    if (found_emulator || !dladdr((void *)find_emulator, &mine)) return found_emulator;
    char beside[4096];
    const char *slash = strrchr(mine.dli_fname, '/'), *path = getenv("FAKE_CUDA_EMULATION");
    snprintf(beside, sizeof beside, "%.*s/libcoldstart_emulation.so", slash ? (int)(slash - mine.dli_fname) : 1, slash ? mine.dli_fname : ".");
    void *library = dlopen(path && *path ? path : beside, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "fake driver: %s\n", dlerror());
        return NULL;
    }
    return found_emulator = (emulator)dlsym(library, "coldstart_emulate");
}
