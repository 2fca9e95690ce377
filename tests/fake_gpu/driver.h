/* What the parts of the fake driver share. Types and codes are declared here, so that nothing of NVIDIA's is needed to compile it;
   with -DWITH_CUDA_H the real header takes their place, and a prototype or a code that differs from it does not compile. */
#ifndef FAKE_DRIVER_H
#define FAKE_DRIVER_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifdef WITH_CUDA_H
#include <cuda.h>
#undef cuEventElapsedTime /* CUDA 13 renames it by a macro; the library exports both names */
#else
typedef enum { FAKE_ATTRIBUTE = 0 } CUdevice_attribute;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct { char bytes[16]; } CUuuid;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef void (*CUhostFn)(void *);
#endif

#define CODES(X)                                                                                                       \
    X(CUDA_SUCCESS, 0, "no error")                                                                                     \
    X(CUDA_ERROR_INVALID_VALUE, 1, "invalid argument")                                                                 \
    X(CUDA_ERROR_OUT_OF_MEMORY, 2, "out of memory")                                                                    \
    X(CUDA_ERROR_NOT_INITIALIZED, 3, "initialization error")                                                           \
    X(CUDA_ERROR_NO_DEVICE, 100, "no CUDA-capable device is detected")                                                 \
    X(CUDA_ERROR_INVALID_DEVICE, 101, "invalid device ordinal")                                                        \
    X(CUDA_ERROR_INVALID_IMAGE, 200, "device kernel image is invalid")                                                 \
    X(CUDA_ERROR_INVALID_CONTEXT, 201, "invalid device context")                                                       \
    X(CUDA_ERROR_NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device")                   \
    X(CUDA_ERROR_ECC_UNCORRECTABLE, 214, "uncorrectable ECC error encountered")                                        \
    X(CUDA_ERROR_INVALID_PTX, 218, "a PTX JIT compilation failed")                                                     \
    X(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, 222, "the provided PTX was compiled with an unsupported toolchain.")         \
    X(CUDA_ERROR_SHARED_OBJECT_INIT_FAILED, 303, "shared object initialization failed")                                \
    X(CUDA_ERROR_OPERATING_SYSTEM, 304, "OS call failed or operation not supported on this OS")                        \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle")                                                       \
    X(CUDA_ERROR_NOT_FOUND, 500, "named symbol not found")                                                             \
    X(CUDA_ERROR_NOT_READY, 600, "device not ready")                                                                   \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                                     \
    X(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, 701, "too many resources requested for launch")                              \
    X(CUDA_ERROR_CONTEXT_IS_DESTROYED, 709, "context is destroyed")                                                    \
    X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, 712, "part or all of the requested memory range is already mapped")   \
    X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, 713, "pointer does not correspond to a registered memory region")         \
    X(CUDA_ERROR_LAUNCH_FAILED, 719, "unspecified launch failure")                                                     \
    X(CUDA_ERROR_NOT_PERMITTED, 800, "operation not permitted")                                                        \
    X(CUDA_ERROR_NOT_SUPPORTED, 801, "operation not supported")                                                        \
    X(CUDA_ERROR_UNKNOWN, 999, "unknown error")

#ifdef WITH_CUDA_H
#define CHECK_CODE(name, code, text) _Static_assert(name == code, #name);
CODES(CHECK_CODE)
#else
#define DECLARE_CODE(name, code, text) name = code,
typedef enum { CODES(DECLARE_CODE) } CUresult;
#endif

enum { MAX_DEVICES = 16, MAX_ARGUMENTS = 64 };

typedef struct context {
    int device;
    int retained;
    CUresult sticky; /* after it nothing of the context works any more, as in the real driver */
    struct stream *default_stream;
    size_t used_bytes;
} context;

typedef struct allocation { /* device memory, or host memory that cuMemHostAlloc gave */
    char *base;
    size_t bytes;
    char *mapping;
    size_t mapping_bytes;
    context *owner;
    int users; /* operations that run on it now */
    bool live;
} allocation;

typedef struct stream {
    context *owner;
    int priority;
    bool blocking; /* takes turns with the default stream */
    bool alive;
    bool ending;
    uint64_t enqueued, done;
    struct operation *first, *last;
    pthread_t thread;
    uint64_t random;
} stream;

typedef struct event {
    context *owner;
    unsigned flags;
    bool alive;
    stream *recorded_in; /* NULL: never recorded */
    uint64_t recorded_at;
    double seconds;
} event;

typedef struct function {
    struct module *module;
    char name[128];
    int parameter_count;
    size_t parameter_bytes[MAX_ARGUMENTS];
} function;

typedef struct module {
    context *owner;
    bool alive;
    int function_count;
    CUfunction handles[64];
} module;

typedef struct dependency {
    stream *stream;
    uint64_t sequence;
} dependency;

enum kind { COPY_IN, COPY_OUT, COPY_WITHIN, FILL, RECORD, WAIT, KERNEL, CALL, WORK }; /* WORK: a library's, on the device */

typedef struct operation {
    enum kind kind;
    uint64_t sequence;
    struct operation *next;
    dependency *needs;
    int need_count;
    char *target;
    const char *source;
    size_t bytes;
    char *staged;      /* a copy of pageable host memory, made at the call */
    bool pinned;       /* the host side has to be pinned still when the copy happens */
    unsigned char value;
    event *event;
    CUhostFn call;
    void *data;
    char name[128];
    unsigned grid[3], block[3], shared_bytes;
    int argument_count;
    void *arguments[MAX_ARGUMENTS];
    size_t argument_bytes[MAX_ARGUMENTS];
} operation;

extern pthread_mutex_t state_lock;
extern pthread_cond_t state_changed;

/* configuration.c: the environment, calls counted by name, failures asked for, the report */
typedef struct configuration {
    int devices;
    int driver_version;
    size_t memory_bytes;
    double init_seconds;
    bool jitter;
    uint64_t seed;
} configuration;
extern configuration settings;
typedef struct counters {
    uint64_t copied_bytes[3];    /* by kind: in, out, within */
    uint64_t copies[3];
    uint64_t pageable_copies[2]; /* in, out */
    uint64_t pageable_bytes[2];
    uint64_t fills, host_functions, library_launches, allocations, registrations, registered_bytes_total, peak_bytes;
} counters;
extern counters counted;
void read_settings(void);
CUresult count_call(const char *name); /* with the lock held; the code that was asked for, or 0 */
void count_launch(const char *name);   /* with the lock held */
void count_copy_priority(enum kind kind, int priority);
const char *state_report(void);
void forget_counts(void);

/* memory.c: all with the lock held */
allocation *new_allocation(context *owner, size_t bytes, bool device);
allocation *device_allocation(uint64_t address); /* live or freed, or NULL */
allocation *host_allocation(uint64_t address);
bool device_range(uint64_t address, size_t bytes); /* inside one live allocation */
bool touches_device(uint64_t address, size_t bytes);
void free_allocation(allocation *one);
void free_all_of(context *owner);
allocation *use_device_range(uint64_t address, size_t bytes);
void end_use(allocation *one);
CUresult register_host(char *base, size_t bytes);
CUresult unregister_host(char *base);
enum pinned { PAGEABLE, PINNED, PARTLY };
enum pinned host_kind(uint64_t address, size_t bytes);
void memory_totals(size_t *count, size_t *bytes, size_t *ranges, size_t *range_bytes);
void forget_host_ranges(void);

/* streams.c: all with the lock held */
stream *new_stream(context *owner, int priority, bool blocking);
stream *default_stream(context *owner);
operation *new_operation(enum kind kind);
void add_need(operation *one, stream *of, uint64_t sequence);
uint64_t enqueue(stream *in, operation *one);
void wait_for(stream *of, uint64_t sequence);
void wait_for_context(context *owner);
void end_streams_of(context *owner);
size_t live_streams(void);
extern __thread bool in_host_function; /* set while a host function runs, which may not call the driver */
extern __thread context *context_of_operation; /* NULL outside the threads of streams */
void guard_against_faults(void);

/* modules.c */
CUresult parse_ptx(const char *text, module *into, function **found, int *found_count);
typedef int (*emulator)(const char *name, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared_bytes, void **arguments);
emulator find_emulator(void);
void forget_emulator(void);

/* what tests ask of the fake, beside NVIDIA's names */
const char *fakecu_report(void);
void fakecu_reset(void);
int fakecu_device_range(unsigned long long address, size_t bytes);
void fakecu_fail(int code);
CUresult fakecu_device_work(CUstream handle, CUhostFn work, void *data);
size_t live_events(void);
size_t live_modules(void);
bool is_initialised(void);
int sticky_code(void);
#endif
