/* NVIDIA's driver API on host memory: the calls that coldstart makes, with what the driver promises of each and no more.

   It is stricter than a driver in one way: cuMemFree and cuMemHostUnregister wait for nothing, so an operation that still uses the memory
   fails with CUDA_ERROR_ILLEGAL_ADDRESS at the next synchronisation. Tests read fakecu_report(), and start again with fakecu_reset(). */
#include "driver.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool initialised;
static pid_t owner_process, loaded_in;
static context contexts[MAX_DEVICES];
static __thread context *current;

/* Handles are numbers that are never used twice: one that was destroyed is known for what it is. */
enum handle_kind { STREAM = 1, EVENT, MODULE, FUNCTION, HANDLE_KINDS };
static void **tables[HANDLE_KINDS];
static size_t table_counts[HANDLE_KINDS];

static void *new_handle(enum handle_kind kind, void *object) {
    tables[kind] = realloc(tables[kind], (table_counts[kind] + 1) * sizeof(void *));
    tables[kind][table_counts[kind]] = object;
    return (void *)((uintptr_t)kind << 48 | (uintptr_t)++table_counts[kind] << 8);
}

static void *object_of(enum handle_kind kind, const void *handle) {
    uintptr_t value = (uintptr_t)handle, index = value >> 8 & 0xFFFFFFFFFF;
    if (value >> 48 != kind || value & 0xFF || index == 0 || index > table_counts[kind]) return NULL;
    return tables[kind][index - 1];
}

bool is_initialised(void) { return initialised; }

int sticky_code(void) {
    for (int n = 0; n < MAX_DEVICES; n++)
        if (contexts[n].sticky) return contexts[n].sticky;
    return 0;
}

size_t live_events(void) {
    size_t live = 0;
    for (size_t n = 0; n < table_counts[EVENT]; n++) live += ((event *)tables[EVENT][n])->alive;
    return live;
}

size_t live_modules(void) {
    size_t live = 0;
    for (size_t n = 0; n < table_counts[MODULE]; n++) live += ((module *)tables[MODULE][n])->alive;
    return live;
}

/* What every call begins with. The lock is held when it returns 0, and free otherwise. */
enum needs { NOTHING, INITIALISED, CONTEXT };

static CUresult refuse(CUresult code) {
    pthread_mutex_unlock(&state_lock);
    return code;
}

static CUresult enter(const char *name, enum needs needs) {
    if (initialised && getpid() != owner_process) return CUDA_ERROR_NOT_INITIALIZED; /* the lock is of a thread that is not here */
    if (in_host_function) return CUDA_ERROR_NOT_PERMITTED;
    pthread_mutex_lock(&state_lock);
    CUresult asked = count_call(name);
    if (asked) return refuse(asked);
    if (needs == NOTHING) return CUDA_SUCCESS;
    if (!initialised) return refuse(CUDA_ERROR_NOT_INITIALIZED);
    if (needs == INITIALISED) return CUDA_SUCCESS;
    if (!current) return refuse(CUDA_ERROR_INVALID_CONTEXT);
    if (!current->retained) return refuse(CUDA_ERROR_CONTEXT_IS_DESTROYED);
    return current->sticky ? refuse(current->sticky) : CUDA_SUCCESS;
}

#define ENTER(needs)                                                                                                   \
    do {                                                                                                               \
        CUresult entered = enter(__func__, needs);                                                                     \
        if (entered) return entered;                                                                                   \
    } while (0)
#define LEAVE(code) return refuse(code)
#define REQUIRE(condition, code)                                                                                       \
    do {                                                                                                               \
        if (!(condition)) LEAVE(code);                                                                                 \
    } while (0)

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
    for (size_t n = 0; n < table_counts[EVENT]; n++) {
        event *made = tables[EVENT][n];
        if (made->owner == one) made->alive = false;
    }
    for (size_t n = 0; n < table_counts[MODULE]; n++) {
        module *made = tables[MODULE][n];
        if (made->owner == one) made->alive = false;
    }
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

/* --- streams and what runs in them --- */

static stream *stream_of(CUstream handle) { /* 0 and 1 are the default stream */
    if ((uintptr_t)handle <= 1) return default_stream(current);
    stream *found = object_of(STREAM, handle);
    return found && found->alive ? found : NULL;
}

static event *event_of(CUevent handle) {
    event *found = object_of(EVENT, handle);
    return found && found->alive ? found : NULL;
}

/* A copy between host and device, with the lock held. `host` is read or written when the stream gets there, if it is pinned. */
static CUresult copy_with_host(enum kind kind, CUdeviceptr device, void *host, size_t bytes, CUstream handle) {
    stream *in = stream_of(handle);
    if (!in) return CUDA_ERROR_INVALID_HANDLE;
    if (bytes == 0) return CUDA_SUCCESS;
    enum pinned pinned = host_kind((uint64_t)host, bytes);
    if (!host || !device_range(device, bytes) || touches_device((uint64_t)host, bytes) || pinned == PARTLY) return CUDA_ERROR_INVALID_VALUE;
    operation *one = new_operation(kind);
    one->target = kind == COPY_IN ? (char *)(uintptr_t)device : host;
    one->source = kind == COPY_IN ? host : (char *)(uintptr_t)device;
    one->bytes = bytes;
    one->pinned = pinned == PINNED;
    if (!one->pinned) {
        counted.pageable_copies[kind]++;
        counted.pageable_bytes[kind] += bytes;
        if (kind == COPY_IN) one->staged = memcpy(malloc(bytes), host, bytes);
    }
    uint64_t sequence = enqueue(in, one);
    if (pinned == PAGEABLE && kind == COPY_OUT) wait_for(in, sequence);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t bytes, CUstream handle) {
    ENTER(CONTEXT);
    LEAVE(copy_with_host(COPY_IN, target, (void *)source, bytes, handle));
}

CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t bytes, CUstream handle) {
    ENTER(CONTEXT);
    LEAVE(copy_with_host(COPY_OUT, source, target, bytes, handle));
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream handle) {
    ENTER(CONTEXT);
    stream *in = stream_of(handle);
    REQUIRE(in, CUDA_ERROR_INVALID_HANDLE);
    if (bytes == 0) LEAVE(CUDA_SUCCESS);
    REQUIRE(device_range(target, bytes) && device_range(source, bytes), CUDA_ERROR_INVALID_VALUE);
    operation *one = new_operation(COPY_WITHIN);
    one->target = (char *)(uintptr_t)target;
    one->source = (char *)(uintptr_t)source;
    one->bytes = bytes;
    enqueue(in, one);
    LEAVE(CUDA_SUCCESS);
}

CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t bytes, CUstream handle) {
    ENTER(CONTEXT);
    stream *in = stream_of(handle);
    REQUIRE(in, CUDA_ERROR_INVALID_HANDLE);
    if (bytes == 0) LEAVE(CUDA_SUCCESS);
    REQUIRE(device_range(target, bytes), CUDA_ERROR_INVALID_VALUE);
    operation *one = new_operation(FILL);
    one->target = (char *)(uintptr_t)target;
    one->value = value;
    one->bytes = bytes;
    enqueue(in, one);
    LEAVE(CUDA_SUCCESS);
}

CUresult cuStreamCreateWithPriority(CUstream *made, unsigned int flags, int priority) {
    ENTER(CONTEXT);
    REQUIRE(made && flags <= 1, CUDA_ERROR_INVALID_VALUE);
    int clamped = priority > 0 ? 0 : priority < -5 ? -5 : priority;
    stream *one = new_stream(current, clamped, flags == 0);
    REQUIRE(one, CUDA_ERROR_OPERATING_SYSTEM);
    *made = new_handle(STREAM, one);
    LEAVE(CUDA_SUCCESS);
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    ENTER(CONTEXT);
    stream *one = (uintptr_t)handle <= 1 ? NULL : stream_of(handle);
    REQUIRE(one, CUDA_ERROR_INVALID_HANDLE);
    one->alive = false; /* what it still has to do is done */
    one->ending = true;
    pthread_detach(one->thread);
    pthread_cond_broadcast(&state_changed);
    LEAVE(CUDA_SUCCESS);
}

CUresult cuStreamQuery(CUstream handle) {
    ENTER(CONTEXT);
    stream *one = stream_of(handle);
    REQUIRE(one, CUDA_ERROR_INVALID_HANDLE);
    if (one->owner->sticky) LEAVE(one->owner->sticky);
    LEAVE(one->done < one->enqueued ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS);
}

CUresult cuStreamSynchronize(CUstream handle) {
    ENTER(CONTEXT);
    stream *one = stream_of(handle);
    REQUIRE(one, CUDA_ERROR_INVALID_HANDLE);
    wait_for(one, one->enqueued);
    LEAVE(one->owner->sticky);
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent awaited, unsigned int flags) {
    ENTER(CONTEXT);
    stream *in = stream_of(handle);
    event *one = event_of(awaited);
    REQUIRE(in && one, CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(flags <= 1, CUDA_ERROR_INVALID_VALUE);
    if (!one->recorded_in) LEAVE(CUDA_SUCCESS);
    operation *waiting = new_operation(WAIT);
    add_need(waiting, one->recorded_in, one->recorded_at);
    enqueue(in, waiting);
    LEAVE(CUDA_SUCCESS);
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn call, void *data) {
    ENTER(CONTEXT);
    stream *in = stream_of(handle);
    REQUIRE(in, CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(call, CUDA_ERROR_INVALID_VALUE);
    operation *one = new_operation(CALL);
    one->call = call;
    one->data = data;
    enqueue(in, one);
    LEAVE(CUDA_SUCCESS);
}

/* --- events --- */

CUresult cuEventCreate(CUevent *made, unsigned int flags) {
    ENTER(CONTEXT);
    REQUIRE(made && flags < 8 && (!(flags & 4) || flags & 2), CUDA_ERROR_INVALID_VALUE);
    event *one = calloc(1, sizeof *one);
    *one = (event){.owner = current, .flags = flags, .alive = true};
    *made = new_handle(EVENT, one);
    LEAVE(CUDA_SUCCESS);
}

CUresult cuEventDestroy_v2(CUevent handle) {
    ENTER(CONTEXT);
    event *one = event_of(handle);
    REQUIRE(one, CUDA_ERROR_INVALID_HANDLE);
    one->alive = false;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuEventRecord(CUevent handle, CUstream where) {
    ENTER(CONTEXT);
    event *one = event_of(handle);
    stream *in = stream_of(where);
    REQUIRE(one && in && one->owner == in->owner, CUDA_ERROR_INVALID_HANDLE);
    operation *record = new_operation(RECORD);
    record->event = one;
    one->recorded_in = in;
    one->recorded_at = enqueue(in, record);
    LEAVE(CUDA_SUCCESS);
}

static bool happened(const event *one) { return !one->recorded_in || one->recorded_in->done >= one->recorded_at; }

CUresult cuEventQuery(CUevent handle) {
    ENTER(CONTEXT);
    event *one = event_of(handle);
    REQUIRE(one, CUDA_ERROR_INVALID_HANDLE);
    LEAVE(happened(one) ? one->owner->sticky : CUDA_ERROR_NOT_READY);
}

CUresult cuEventSynchronize(CUevent handle) {
    ENTER(CONTEXT);
    event *one = event_of(handle);
    REQUIRE(one, CUDA_ERROR_INVALID_HANDLE);
    if (one->recorded_in) wait_for(one->recorded_in, one->recorded_at);
    LEAVE(one->owner->sticky);
}

static CUresult elapsed(float *milliseconds, CUevent first, CUevent second) {
    event *begin = event_of(first), *end = event_of(second);
    if (!milliseconds) return CUDA_ERROR_INVALID_VALUE;
    if (!begin || !end || !begin->recorded_in || !end->recorded_in || (begin->flags | end->flags) & 2) return CUDA_ERROR_INVALID_HANDLE;
    if (!happened(begin) || !happened(end)) return CUDA_ERROR_NOT_READY;
    *milliseconds = (float)((end->seconds - begin->seconds) * 1e3);
    return CUDA_SUCCESS;
}

CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent first, CUevent second) {
    ENTER(CONTEXT);
    LEAVE(elapsed(milliseconds, first, second));
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent first, CUevent second);
CUresult cuEventElapsedTime(float *milliseconds, CUevent first, CUevent second) {
    ENTER(CONTEXT);
    LEAVE(elapsed(milliseconds, first, second));
}

/* --- modules and kernels --- */

CUresult cuModuleLoadData(CUmodule *made, const void *image) {
    ENTER(CONTEXT);
    REQUIRE(made && image, CUDA_ERROR_INVALID_VALUE);
    module *one = calloc(1, sizeof *one);
    function *found[64];
    int count;
    CUresult code = parse_ptx(image, one, found, &count);
    REQUIRE(!code, code);
    *one = (module){.owner = current, .alive = true, .function_count = count};
    for (int n = 0; n < count; n++) one->handles[n] = new_handle(FUNCTION, found[n]);
    *made = new_handle(MODULE, one);
    LEAVE(CUDA_SUCCESS);
}

static module *module_of(CUmodule handle) {
    module *found = object_of(MODULE, handle);
    return found && found->alive ? found : NULL;
}

CUresult cuModuleUnload(CUmodule handle) {
    ENTER(CONTEXT);
    module *one = module_of(handle);
    REQUIRE(one, CUDA_ERROR_INVALID_HANDLE);
    one->alive = false;
    LEAVE(CUDA_SUCCESS);
}

CUresult cuModuleGetFunction(CUfunction *found, CUmodule handle, const char *name) {
    ENTER(CONTEXT);
    module *one = module_of(handle);
    REQUIRE(found && name, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(one, CUDA_ERROR_INVALID_HANDLE);
    for (int n = 0; n < one->function_count; n++) {
        const function *each = object_of(FUNCTION, one->handles[n]);
        if (strcmp(each->name, name) != 0) continue;
        *found = one->handles[n];
        LEAVE(CUDA_SUCCESS);
    }
    LEAVE(CUDA_ERROR_NOT_FOUND);
}

static void copy_arguments(operation *to, const function *of, void **arguments) {
    for (int n = 0; n < of->parameter_count; n++) {
        to->argument_bytes[n] = of->parameter_bytes[n];
        to->arguments[n] = memcpy(malloc(of->parameter_bytes[n]), arguments[n], of->parameter_bytes[n]);
    }
    to->argument_count = of->parameter_count;
}

CUresult cuLaunchKernel(CUfunction handle, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
                        unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, CUstream where, void **arguments, void **extra) {
    ENTER(CONTEXT);
    function *one = object_of(FUNCTION, handle);
    stream *in = stream_of(where);
    REQUIRE(one && in && one->module->alive && one->module->owner == current && in->owner == current, CUDA_ERROR_INVALID_HANDLE);
    REQUIRE(grid_x && grid_y && grid_z && block_x && block_y && block_z, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(grid_x <= 2147483647u && grid_y <= 65535 && grid_z <= 65535, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(block_x <= 1024 && block_y <= 1024 && block_z <= 64 && block_x * block_y * block_z <= 1024, CUDA_ERROR_INVALID_VALUE);
    REQUIRE(shared_bytes <= 49152 && (arguments || !one->parameter_count), CUDA_ERROR_INVALID_VALUE);
    REQUIRE(!extra, CUDA_ERROR_NOT_SUPPORTED);
    for (int n = 0; n < one->parameter_count; n++) REQUIRE(arguments[n], CUDA_ERROR_INVALID_VALUE);
    REQUIRE(find_emulator(), CUDA_ERROR_SHARED_OBJECT_INIT_FAILED);
    operation *launch = new_operation(KERNEL);
    memcpy(launch->name, one->name, sizeof launch->name);
    copy_arguments(launch, one, arguments);
    unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    memcpy(launch->grid, grid, sizeof grid);
    memcpy(launch->block, block, sizeof block);
    launch->shared_bytes = shared_bytes;
    enqueue(in, launch);
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

void fakecu_fail(int code) { /* from a host function: what it did went wrong on the device */
    pthread_mutex_lock(&state_lock);
    if (context_of_operation && !context_of_operation->sticky) context_of_operation->sticky = (CUresult)code;
    pthread_mutex_unlock(&state_lock);
}
