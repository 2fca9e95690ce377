/* The part of the driver's API that is about streams: what is queued to them, events, modules and kernels. */
#include "api.h"
#include <stdlib.h>
#include <string.h>

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

void end_handles_of(context *owner) {
    for (size_t n = 0; n < table_counts[EVENT]; n++) {
        event *made = tables[EVENT][n];
        if (made->owner == owner) made->alive = false;
    }
    for (size_t n = 0; n < table_counts[MODULE]; n++) {
        module *made = tables[MODULE][n];
        if (made->owner == owner) made->alive = false;
    }
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

CUresult fakecu_device_work(CUstream handle, CUhostFn work, void *data) { /* a fake library's kernels: a fault there is the device's */
    ENTER(CONTEXT);
    stream *in = stream_of(handle);
    REQUIRE(in, CUDA_ERROR_INVALID_HANDLE);
    operation *one = new_operation(WORK);
    one->call = work;
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
