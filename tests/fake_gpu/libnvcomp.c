/* nvCOMP on host memory: the calls that coldstart makes, done when the stream of the fake driver gets to them.

   Frames of zstd are decoded by the system's libzstd. ANS is a form of the fake's own that no nvCOMP reads. Where nvCOMP promises nothing
   (misaligned addresses, too little scratch, memory that is not the device's), the fake reports an error, and it writes all over the
   scratch. Checked against NVIDIA's headers with -DWITH_NVCOMP_H. FAKE_NVCOMP_VERSION=5300 makes it another version. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STATUSES(X)                                                                                                    \
    X(nvcompSuccess, 0)                                                                                                \
    X(nvcompErrorInvalidValue, 10)                                                                                     \
    X(nvcompErrorNotSupported, 11)                                                                                     \
    X(nvcompErrorCannotDecompress, 12)                                                                                 \
    X(nvcompErrorAlignment, 17)                                                                                        \
    X(nvcompErrorChunkSizeTooLarge, 18)                                                                                \
    X(nvcompErrorCannotCompress, 19)                                                                                   \
    X(nvcompErrorWrongInputLength, 20)                                                                                 \
    X(nvcompErrorCudaError, 1000)

#ifdef WITH_NVCOMP_H
#include <nvcomp.h>
#define CHECK_STATUS(name, value) _Static_assert(name == value, #name);
STATUSES(CHECK_STATUS)
#else
#define DECLARE_STATUS(name, value) name = value,
typedef enum { STATUSES(DECLARE_STATUS) } nvcompStatus_t;
typedef enum { NVCOMP_TYPE_UCHAR = 1, NVCOMP_TYPE_FLOAT16 = 10, NVCOMP_TYPE_BITS = 0xff } nvcompType_t;
typedef struct CUstream_st *cudaStream_t;
typedef struct { uint32_t version, cudart_version; } nvcompProperties_t;
typedef struct { size_t input, output, temp; } nvcompAlignmentRequirements_t;
typedef struct { int backend; char reserved[60]; } nvcompBatchedZstdDecompressOpts_t;
typedef struct {
    int type;
    nvcompType_t data_type;
    uint8_t max_sub_chunk_count, states_per_lane, histogram_reduction_log2;
    char reserved[53];
} nvcompBatchedANSCompressOpts_t;
typedef struct {
    int backend;
    nvcompType_t data_type;
    uint8_t max_sub_chunk_count, states_per_lane, skip_validate;
    char reserved[53];
} nvcompBatchedANSDecompressOpts_t;
#endif

/* --- what it stands on: the fake driver, and the system's zstd --- */

static struct {
    int (*launch)(cudaStream_t, void (*)(void *), void *);
    int (*on_device)(unsigned long long, size_t);
    void (*fail)(int);
} driver;
static struct {
    size_t (*decompress)(void *, size_t, const void *, size_t);
    size_t (*compress)(void *, size_t, const void *, size_t, int);
    unsigned (*is_error)(size_t);
    unsigned long long (*content_size)(const void *, size_t);
} zstd;

static void *open_driver(void) { /* the fake one that lies beside this library */
    Dl_info mine;
    char path[4096];
    if (!dladdr((void *)open_driver, &mine)) return NULL;
    const char *slash = strrchr(mine.dli_fname, '/');
    snprintf(path, sizeof path, "%.*s/libcuda.so.1", slash ? (int)(slash - mine.dli_fname) : 1, slash ? mine.dli_fname : ".");
    return dlopen(path, RTLD_NOW);
}

static bool find_all(void) { /* the same pointers for whichever thread writes them */
    void *cuda = open_driver(), *library = dlopen("libzstd.so.1", RTLD_NOW);
    if (!cuda || !library) return false;
    *(void **)&driver.launch = dlsym(cuda, "fakecu_device_work");
    *(void **)&driver.on_device = dlsym(cuda, "fakecu_device_range");
    *(void **)&driver.fail = dlsym(cuda, "fakecu_fail");
    *(void **)&zstd.decompress = dlsym(library, "ZSTD_decompress");
    *(void **)&zstd.compress = dlsym(library, "ZSTD_compress");
    *(void **)&zstd.is_error = dlsym(library, "ZSTD_isError");
    *(void **)&zstd.content_size = dlsym(library, "ZSTD_getFrameContentSize");
    return driver.launch && driver.on_device && driver.fail && zstd.decompress && zstd.compress && zstd.is_error && zstd.content_size;
}

/* --- the fake's ANS: a header, and a zstd frame --- */

typedef struct ans_header {
    char magic[8];
    uint64_t raw_bytes;
    uint32_t data_type, reserved;
} ans_header;
static const char ANS_MAGIC[8] = "fakeANS6";
enum { ANS_MAX_RAW = 1 << 24, ANS_ALIGNMENT = 16 };

static bool is_ans_type(int type) { return type == NVCOMP_TYPE_UCHAR || type == NVCOMP_TYPE_FLOAT16; }
static size_t ans_room(size_t raw_bytes, int type) { /* a little more than nvCOMP asks for */
    return raw_bytes + raw_bytes / 8 * (type == NVCOMP_TYPE_FLOAT16 ? 1 : 3) + 4096;
}

static nvcompStatus_t encode_ans(const char *raw, size_t raw_bytes, char *target, size_t *stored_bytes, int type) {
    if (raw_bytes > ANS_MAX_RAW) return nvcompErrorChunkSizeTooLarge;
    if (type == NVCOMP_TYPE_FLOAT16 && raw_bytes % 2) return nvcompErrorWrongInputLength;
    ans_header header = {.raw_bytes = raw_bytes, .data_type = (uint32_t)type};
    memcpy(header.magic, ANS_MAGIC, sizeof header.magic);
    size_t frame_bytes = zstd.compress(target + sizeof header, ans_room(raw_bytes, type) - sizeof header, raw, raw_bytes, 1);
    if (zstd.is_error(frame_bytes)) return nvcompErrorCannotCompress;
    memcpy(target, &header, sizeof header);
    *stored_bytes = sizeof header + frame_bytes;
    return nvcompSuccess;
}

static nvcompStatus_t decode_zstd(const char *stored, size_t stored_bytes, char *target, size_t room_bytes, size_t *decoded_bytes) {
    unsigned long long claimed = zstd.content_size(stored, stored_bytes);
    if (claimed > room_bytes) return nvcompErrorCannotDecompress; /* unknown and malformed are the largest numbers */
    size_t bytes = zstd.decompress(target, room_bytes, stored, stored_bytes);
    if (zstd.is_error(bytes)) return nvcompErrorCannotDecompress;
    *decoded_bytes = bytes;
    return nvcompSuccess;
}

static nvcompStatus_t decode_ans(const char *stored, size_t stored_bytes, char *target, size_t room_bytes, size_t *decoded_bytes, int type) {
    ans_header header;
    if (stored_bytes < sizeof header) return nvcompErrorCannotDecompress;
    memcpy(&header, stored, sizeof header);
    bool right_type = type == NVCOMP_TYPE_BITS || (uint32_t)type == header.data_type;
    if (memcmp(header.magic, ANS_MAGIC, sizeof header.magic) || !right_type) return nvcompErrorCannotDecompress;
    nvcompStatus_t status = decode_zstd(stored + sizeof header, stored_bytes - sizeof header, target, room_bytes, decoded_bytes);
    return status == nvcompSuccess && *decoded_bytes != header.raw_bytes ? nvcompErrorCannotDecompress : status;
}

/* --- a batch: queued at the call, done at its place in the stream --- */

enum work { DECODE_ZSTD, DECODE_ANS, ENCODE_ANS };
typedef struct batch {
    enum work work;
    int type;
    size_t count;
    char *const *sources;
    const size_t *source_bytes;
    const size_t *room_bytes; /* of targets; an encoder's is ans_room */
    char *const *targets;
    size_t *target_bytes;
    nvcompStatus_t *statuses;
    char *scratch;
    size_t scratch_bytes;
} batch;

static size_t zstd_scratch(size_t count, size_t largest) { return count * (3 * largest + 6936 * ((largest + 131071) / 131072)); }

static bool device(const void *address, size_t bytes) { return bytes == 0 || driver.on_device((unsigned long long)(uintptr_t)address, bytes); }

static bool arrays_are_there(const batch *all) {
    size_t pointers = all->count * sizeof(void *), sizes = all->count * sizeof(size_t);
    return device(all->sources, pointers) && device(all->source_bytes, sizes) && device(all->targets, pointers) &&
           device(all->target_bytes, sizes) && (!all->room_bytes || device(all->room_bytes, sizes)) &&
           (!all->statuses || device(all->statuses, all->count * sizeof(nvcompStatus_t))) && device(all->scratch, all->scratch_bytes);
}

static size_t room_of(const batch *all, size_t n) { return all->room_bytes ? all->room_bytes[n] : ans_room(all->source_bytes[n], all->type); }

static nvcompStatus_t do_item(const batch *all, size_t n) {
    const char *source = all->sources[n];
    char *target = all->targets[n];
    size_t source_bytes = all->source_bytes[n], room_bytes = room_of(all, n), *written = &all->target_bytes[n];
    bool aligned = ((uintptr_t)source | (uintptr_t)target) % ANS_ALIGNMENT == 0;
    *written = 0;
    if (all->work != DECODE_ZSTD && !aligned) return nvcompErrorAlignment;
    switch (all->work) {
    case DECODE_ZSTD: return decode_zstd(source, source_bytes, target, room_bytes, written);
    case DECODE_ANS: return decode_ans(source, source_bytes, target, room_bytes, written, all->type);
    default: return encode_ans(source, source_bytes, target, written, all->type);
    }
}

static bool scratch_is_enough(const batch *all) {
    size_t largest = 0;
    for (size_t n = 0; all->work == DECODE_ZSTD && n < all->count; n++)
        if (all->room_bytes[n] > largest) largest = all->room_bytes[n];
    return all->scratch_bytes >= zstd_scratch(all->count, largest);
}

static void do_batch(void *argument) {
    batch *all = argument;
    bool there = arrays_are_there(all);
    for (size_t n = 0; there && n < all->count; n++)
        there = device(all->sources[n], all->source_bytes[n]) && device(all->targets[n], room_of(all, n));
    if (!there) driver.fail(700);
    bool enough = there && (all->work != DECODE_ZSTD || scratch_is_enough(all));
    if (there && all->scratch) memset(all->scratch, 0xEE, all->scratch_bytes);
    for (size_t n = 0; there && n < all->count; n++) {
        nvcompStatus_t status = enough ? do_item(all, n) : nvcompErrorInvalidValue;
        if (all->statuses) all->statuses[n] = status;
    }
    free(all);
}

static nvcompStatus_t queue(batch wanted, cudaStream_t stream) {
    if (!find_all()) return nvcompErrorCudaError;
    if (wanted.count == 0) return nvcompSuccess;
    if (!wanted.sources || !wanted.source_bytes || !wanted.targets || !wanted.target_bytes) return nvcompErrorInvalidValue;
    if (wanted.work == DECODE_ZSTD && (uintptr_t)wanted.scratch % 8) return nvcompErrorAlignment;
    batch *all = malloc(sizeof *all);
    *all = wanted;
    if (driver.launch(stream, do_batch, all) == 0) return nvcompSuccess;
    free(all);
    return nvcompErrorCudaError;
}

/* --- nvCOMP's names --- */

nvcompStatus_t nvcompGetProperties(nvcompProperties_t *properties) {
    if (!properties) return nvcompErrorInvalidValue;
    const char *version = getenv("FAKE_NVCOMP_VERSION");
    *properties = (nvcompProperties_t){.version = version ? (uint32_t)atoi(version) : 6000, .cudart_version = 12090};
    return nvcompSuccess;
}

static nvcompStatus_t alignments(nvcompAlignmentRequirements_t *to, size_t item, size_t temp) {
    if (!to) return nvcompErrorInvalidValue;
    *to = (nvcompAlignmentRequirements_t){.input = item, .output = item, .temp = temp};
    return nvcompSuccess;
}

nvcompStatus_t nvcompBatchedZstdDecompressGetRequiredAlignments(nvcompBatchedZstdDecompressOpts_t options, nvcompAlignmentRequirements_t *found) {
    (void)options;
    return alignments(found, 1, 8);
}

nvcompStatus_t nvcompBatchedANSCompressGetRequiredAlignments(nvcompBatchedANSCompressOpts_t options, nvcompAlignmentRequirements_t *found) {
    return is_ans_type(options.data_type) ? alignments(found, ANS_ALIGNMENT, 1) : nvcompErrorNotSupported;
}

nvcompStatus_t nvcompBatchedANSDecompressGetRequiredAlignments(nvcompBatchedANSDecompressOpts_t options, nvcompAlignmentRequirements_t *found) {
    (void)options;
    return alignments(found, ANS_ALIGNMENT, 1);
}

nvcompStatus_t nvcompBatchedZstdDecompressGetTempSize(size_t count, size_t largest, nvcompBatchedZstdDecompressOpts_t options, size_t *needed,
                                                      size_t total, cudaStream_t stream) {
    (void)options, (void)total, (void)stream;
    if (!needed) return nvcompErrorInvalidValue;
    *needed = zstd_scratch(count, largest);
    return nvcompSuccess;
}

nvcompStatus_t nvcompBatchedANSCompressGetTempSize(size_t count, size_t largest, nvcompBatchedANSCompressOpts_t options, size_t *needed,
                                                   size_t total, cudaStream_t stream) {
    (void)count, (void)largest, (void)total, (void)stream;
    if (!needed || !is_ans_type(options.data_type)) return nvcompErrorInvalidValue;
    *needed = 0;
    return nvcompSuccess;
}

nvcompStatus_t nvcompBatchedANSDecompressGetTempSize(size_t count, size_t largest, nvcompBatchedANSDecompressOpts_t options, size_t *needed,
                                                     size_t total, cudaStream_t stream) {
    (void)count, (void)largest, (void)options, (void)total, (void)stream;
    if (!needed) return nvcompErrorInvalidValue;
    *needed = 0;
    return nvcompSuccess;
}

nvcompStatus_t nvcompBatchedANSCompressGetMaxOutputChunkSize(size_t raw_bytes, nvcompBatchedANSCompressOpts_t options, size_t *most) {
    if (!most || !is_ans_type(options.data_type)) return nvcompErrorInvalidValue;
    if (raw_bytes > ANS_MAX_RAW) return nvcompErrorChunkSizeTooLarge;
    *most = ans_room(raw_bytes, options.data_type);
    return nvcompSuccess;
}

nvcompStatus_t nvcompBatchedZstdDecompressAsync(const void *const *stored, const size_t *stored_bytes, const size_t *room_bytes,
                                                size_t *decoded_bytes, size_t count, void *const scratch, size_t scratch_bytes,
                                                void *const *targets, nvcompBatchedZstdDecompressOpts_t options, nvcompStatus_t *statuses,
                                                cudaStream_t stream) {
    (void)options;
    if (!room_bytes) return nvcompErrorInvalidValue;
    return queue((batch){DECODE_ZSTD, 0, count, (char *const *)stored, stored_bytes, room_bytes, (char *const *)targets, decoded_bytes, statuses,
                         scratch, scratch_bytes}, stream);
}

nvcompStatus_t nvcompBatchedANSDecompressAsync(const void *const *stored, const size_t *stored_bytes, const size_t *room_bytes,
                                               size_t *decoded_bytes, size_t count, void *const scratch, size_t scratch_bytes,
                                               void *const *targets, nvcompBatchedANSDecompressOpts_t options, nvcompStatus_t *statuses,
                                               cudaStream_t stream) {
    if (!room_bytes) return nvcompErrorInvalidValue;
    return queue((batch){DECODE_ANS, options.data_type, count, (char *const *)stored, stored_bytes, room_bytes, (char *const *)targets,
                         decoded_bytes, statuses, scratch, scratch_bytes}, stream);
}

nvcompStatus_t nvcompBatchedANSCompressAsync(const void *const *raw, const size_t *raw_bytes, size_t largest, size_t count, void *scratch,
                                             size_t scratch_bytes, void *const *targets, size_t *stored_bytes,
                                             nvcompBatchedANSCompressOpts_t options, nvcompStatus_t *statuses, cudaStream_t stream) {
    if (!is_ans_type(options.data_type)) return nvcompErrorNotSupported;
    if (largest > ANS_MAX_RAW) return nvcompErrorChunkSizeTooLarge;
    return queue((batch){ENCODE_ANS, options.data_type, count, (char *const *)raw, raw_bytes, NULL, (char *const *)targets, stored_bytes,
                         statuses, scratch, scratch_bytes}, stream);
}
