/* NVIDIA's driver API on host memory: the calls that coldstart makes, with what the driver promises of each and no more.

   It is stricter than a driver in one way: cuMemFree and cuMemHostUnregister wait for nothing, so an operation that still uses the memory
   fails with CUDA_ERROR_ILLEGAL_ADDRESS at the next synchronisation. Tests read fakecu_report(), and start again with fakecu_reset(). */
#include "api.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool initialised;
static pid_t owner_process, loaded_in;
static context contexts[MAX_DEVICES];
__thread context *current;

bool is_initialised(void) { return initialised; }

int sticky_code(void) {
    for (int n = 0; n < MAX_DEVICES; n++)
        if (contexts[n].sticky) return contexts[n].sticky;
    return 0;
}

CUresult refuse(CUresult code) {
    pthread_mutex_unlock(&state_lock);
    return code;
}

static bool is_fatal(CUresult code) { /* what leaves nothing of a context */
    return code == CUDA_ERROR_ILLEGAL_ADDRESS || code == CUDA_ERROR_LAUNCH_FAILED || code == CUDA_ERROR_ECC_UNCORRECTABLE;
}

CUresult enter(const char *name, enum needs needs) {
    if (initialised && getpid() != owner_process) return CUDA_ERROR_NOT_INITIALIZED; /* the lock is of a thread that is not here */
    if (in_host_function) return CUDA_ERROR_NOT_PERMITTED;
    pthread_mutex_lock(&state_lock);
    CUresult asked = count_call(name);
    if (current && is_fatal(asked)) current->sticky = asked;
    if (asked) return refuse(asked);
    if (needs == NOTHING) return CUDA_SUCCESS;
    if (!initialised) return refuse(CUDA_ERROR_NOT_INITIALIZED);
    if (needs == INITIALISED) return CUDA_SUCCESS;
    if (!current) return refuse(CUDA_ERROR_INVALID_CONTEXT);
    if (!current->retained) return refuse(CUDA_ERROR_CONTEXT_IS_DESTROYED);
    return current->sticky ? refuse(current->sticky) : CUDA_SUCCESS;
}

/* --- the process and its devices --- */

static void report_at_exit(void) {
    const char *path = getenv("FAKE_CUDA_REPORT");
    if (!path || !*path || getpid() != loaded_in) return;
    FILE *file = fopen(path, "a");
    if (!file) return;
    fprintf(file, "%s\n", fakecu_report());
    fclose(file);
}

__attribute__((constructor)) static void on_load(void) {
    loaded_in = getpid();
    read_settings();
    atexit(report_at_exit);
}

CUresult cuInit(unsigned int flags) {
    ENTER(NOTHING);
    REQUIRE(flags == 0, CUDA_ERROR_INVALID_VALUE);
    if (initialised) LEAVE(CUDA_SUCCESS);
    pthread_mutex_unlock(&state_lock);
    usleep((useconds_t)(settings.init_seconds * 1e6));
    pthread_mutex_lock(&state_lock);
    REQUIRE(settings.devices > 0, CUDA_ERROR_NO_DEVICE);
    guard_against_faults();
    for (int n = 0; n < MAX_DEVICES; n++) contexts[n].device = n;
    owner_process = getpid();
    initialised = true;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuDriverGetVersion(int *version) {
    ENTER(NOTHING);
    REQUIRE(version, CUDA_ERROR_INVALID_VALUE);
    *version = settings.driver_version;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuDeviceGetCount(int *count) {
    ENTER(INITIALISED);
    REQUIRE(count, CUDA_ERROR_INVALID_VALUE);
    *count = settings.devices;
    LEAVE(CUDA_SUCCESS);
}

static bool is_device(CUdevice device) { return device >= 0 && device < settings.devices; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(INITIALISED);
    REQUIRE(device, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(ordinal), CUDA_ERROR_INVALID_DEVICE);
    *device = ordinal;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    ENTER(INITIALISED);
    REQUIRE(name && length > 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    snprintf(name, (size_t)length, "Fake H100 %d", device);
    LEAVE(CUDA_SUCCESS);
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    ENTER(INITIALISED);
    REQUIRE(uuid, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    memcpy(uuid->bytes, "fake-gpu-uuid-00", 16);
    uuid->bytes[15] = (char)device;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    ENTER(INITIALISED);
    REQUIRE(bytes, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    *bytes = settings.memory_bytes;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    static const int known[][2] = {{1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {10, 32},
                                   {13, 1980000}, {16, 132}, {18, 0}, {19, 1}, {36, 2619000}, {37, 5120}, {38, 52428800}, {39, 2048},
                                   {40, 3}, {41, 1}, {75, 9}, {76, 0}, {78, 1}, {88, 0}, {91, 1}, {97, 232448}, {99, 1}, {115, 1}};
    ENTER(INITIALISED);
    REQUIRE(value && (int)attribute > 0 && (int)attribute < 200, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    *value = (int)attribute == 33 ? device + 1 : 0; /* the PCI bus */
    for (size_t n = 0; n < sizeof known / sizeof *known; n++)
        if (known[n][0] == (int)attribute) *value = known[n][1];
    LEAVE(CUDA_SUCCESS);
}

/* --- contexts --- */

static void destroy_context(context *one) {
    end_streams_of(one);
    free_all_of(one);
    end_handles_of(one);
    one->sticky = CUDA_SUCCESS;
    one->retained = 0;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice device) {
    ENTER(INITIALISED);
    REQUIRE(made, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    contexts[device].retained++;
    *made = (CUcontext)&contexts[device];
    LEAVE(CUDA_SUCCESS);
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER(INITIALISED);
    REQUIRE(is_device(device), CUDA_ERROR_INVALID_DEVICE);
    REQUIRE(contexts[device].retained > 0, CUDA_ERROR_INVALID_CONTEXT);
    if (contexts[device].retained == 1) destroy_context(&contexts[device]);
    else contexts[device].retained--;
    LEAVE(CUDA_SUCCESS);
}

static bool is_context(const context *one) { return one >= contexts && one < contexts + MAX_DEVICES && one->retained; }

CUresult cuCtxSetCurrent(CUcontext wanted) {
    ENTER(INITIALISED);
    REQUIRE(!wanted || is_context((context *)wanted), CUDA_ERROR_INVALID_CONTEXT);
    current = (context *)wanted;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuCtxGetCurrent(CUcontext *found) {
    ENTER(INITIALISED);
    REQUIRE(found, CUDA_ERROR_INVALID_VALUE);
    *found = (CUcontext)current;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER(CONTEXT);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuCtxSynchronize(void) {
    ENTER(CONTEXT);
    wait_for_context(current);
    LEAVE(current->sticky);
}

/* --- memory --- */

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) {
    ENTER(CONTEXT);
    if (free_bytes) *free_bytes = settings.memory_bytes - current->used_bytes;
    if (total_bytes) *total_bytes = settings.memory_bytes;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER(CONTEXT);
    REQUIRE(address && bytes > 0, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(bytes <= settings.memory_bytes - current->used_bytes, CUDA_ERROR_OUT_OF_MEMORY);
    allocation *made = new_allocation(current, bytes, true);
    REQUIRE(made, CUDA_ERROR_OUT_OF_MEMORY);
    *address = (CUdeviceptr)(uintptr_t)made->base;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER(CONTEXT);
    if (address == 0) LEAVE(CUDA_SUCCESS);
    allocation *one = device_allocation(address);
    REQUIRE(one && one->live && (CUdeviceptr)(uintptr_t)one->base == address, CUDA_ERROR_INVALID_VALUE);
    free_allocation(one);
    LEAVE(CUDA_SUCCESS);
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    ENTER(CONTEXT);
    allocation *one = device_allocation(address);
    REQUIRE(one && one->live, CUDA_ERROR_NOT_FOUND);
    if (base) *base = (CUdeviceptr)(uintptr_t)one->base;
    if (bytes) *bytes = one->bytes;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuMemHostRegister_v2(void *base, size_t bytes, unsigned int flags) {
    ENTER(CONTEXT);
    REQUIRE(base && flags < 16, CUDA_ERROR_INVALID_VALUE);
    LEAVE(register_host(base, bytes));
}

CUresult cuMemHostUnregister(void *base) {
    ENTER(CONTEXT);
    REQUIRE(base, CUDA_ERROR_INVALID_VALUE);
    LEAVE(unregister_host(base));
}

CUresult cuMemHostAlloc(void **base, size_t bytes, unsigned int flags) {
    ENTER(CONTEXT);
    REQUIRE(base && bytes > 0 && flags < 8, CUDA_ERROR_INVALID_VALUE);
    allocation *made = new_allocation(current, bytes, false);
    REQUIRE(made, CUDA_ERROR_OUT_OF_MEMORY);
    *base = made->base;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuMemFreeHost(void *base) {
    ENTER(CONTEXT);
    allocation *one = host_allocation((uint64_t)base);
    REQUIRE(one && one->live && one->base == base, CUDA_ERROR_INVALID_VALUE);
    free_allocation(one);
    LEAVE(CUDA_SUCCESS);
}

/* --- errors: these two need nothing, not even the lock --- */

#define NAME_OF_CODE(name, code, text) {code, #name, text},
static const struct {
    int code;
    const char *name, *text;
} code_names[] = {CODES(NAME_OF_CODE)};

CUresult cuGetErrorName(CUresult error, const char **text) {
    if (!text) return CUDA_ERROR_INVALID_VALUE;
    *text = NULL;
    for (size_t n = 0; n < sizeof code_names / sizeof *code_names; n++)
        if (code_names[n].code == (int)error) *text = code_names[n].name;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    if (!text) return CUDA_ERROR_INVALID_VALUE;
    *text = NULL;
    for (size_t n = 0; n < sizeof code_names / sizeof *code_names; n++)
        if (code_names[n].code == (int)error) *text = code_names[n].text;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* --- for tests --- */

const char *fakecu_report(void) { /* valid until the next one */
    pthread_mutex_lock(&state_lock);
    const char *text = state_report();
    pthread_mutex_unlock(&state_lock);
    return text;
}

void fakecu_reset(void) { /* as a process that has not called cuInit, with the environment read anew */
    pthread_mutex_lock(&state_lock);
    for (int n = 0; n < MAX_DEVICES; n++)
        if (contexts[n].retained) destroy_context(&contexts[n]);
    forget_host_ranges();
    forget_counts();
    forget_emulator();
    initialised = false;
    current = NULL;
    read_settings();
    pthread_mutex_unlock(&state_lock);
}

int fakecu_device_range(unsigned long long address, size_t bytes) { /* whether it lies in one live allocation */
    pthread_mutex_lock(&state_lock);
    int inside = device_range(address, bytes);
    pthread_mutex_unlock(&state_lock);
    return inside;
}

void fakecu_fail(int code) { /* from a library's work: it went wrong on the device */
    pthread_mutex_lock(&state_lock);
    if (context_of_operation && !context_of_operation->sticky) context_of_operation->sticky = (CUresult)code;
    pthread_mutex_unlock(&state_lock);
}
