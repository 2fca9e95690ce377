/* The fake's settings, which come from the environment, and what it counts. */
#include "driver.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

configuration settings;
counters counted;

typedef struct tally {
    char name[128];
    uint64_t times;
} tally;
typedef struct tallies {
    tally *list;
    size_t count;
} tallies;
static tallies calls, launches, priorities[3];

typedef struct failure {
    char name[64];
    uint64_t at; /* 0: every call */
    int code;
} failure;
static failure failures[32];
static size_t failure_count;

static long long number(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoll(text) : otherwise;
}

static void read_failures(void) { /* "cuMemAlloc_v2:2=2,cuInit:*=100" */
    failure_count = 0;
    const char *text = getenv("FAKE_CUDA_FAIL");
    while (text && *text && failure_count < 32) {
        failure one = {.at = 0};
        char which[24] = "";
        if (sscanf(text, " %63[A-Za-z0-9_]:%23[0-9*]=%d", one.name, which, &one.code) == 3) {
            one.at = which[0] == '*' ? 0 : strtoull(which, NULL, 10);
            failures[failure_count++] = one;
        } else {
            fprintf(stderr, "fake driver: FAKE_CUDA_FAIL is not understood at %s\n", text);
            abort();
        }
        text = strchr(text, ',');
        if (text) text++;
    }
}

void read_settings(void) {
    settings.devices = (int)number("FAKE_CUDA_DEVICES", 1);
    if (settings.devices > MAX_DEVICES) settings.devices = MAX_DEVICES;
    settings.driver_version = (int)number("FAKE_CUDA_DRIVER_VERSION", 12080);
    settings.memory_bytes = (size_t)number("FAKE_CUDA_MEMORY_BYTES", 2ll << 30);
    const char *seconds = getenv("FAKE_CUDA_INIT_SECONDS");
    settings.init_seconds = seconds ? atof(seconds) : 0;
    settings.jitter = getenv("FAKE_CUDA_JITTER") && *getenv("FAKE_CUDA_JITTER");
    settings.seed = (uint64_t)number("FAKE_CUDA_JITTER", 0);
    read_failures();
}

static uint64_t add(tallies *to, const char *name) {
    for (size_t n = 0; n < to->count; n++)
        if (strcmp(to->list[n].name, name) == 0) return ++to->list[n].times;
    to->list = realloc(to->list, (to->count + 1) * sizeof *to->list);
    tally *made = &to->list[to->count++];
    snprintf(made->name, sizeof made->name, "%s", name);
    return made->times = 1;
}

CUresult count_call(const char *name) {
    uint64_t times = add(&calls, name);
    for (size_t n = 0; n < failure_count; n++)
        if (strcmp(failures[n].name, name) == 0 && (failures[n].at == 0 || failures[n].at == times)) return failures[n].code;
    return CUDA_SUCCESS;
}

void count_launch(const char *name) { add(&launches, name); }

void count_copy_priority(enum kind kind, int priority) {
    char text[16];
    snprintf(text, sizeof text, "%d", priority);
    add(&priorities[kind], text);
}

void forget_counts(void) {
    memset(&counted, 0, sizeof counted);
    calls.count = launches.count = 0;
    for (int n = 0; n < 3; n++) priorities[n].count = 0;
}

static void put_tallies(FILE *to, const char *name, const tallies *all, const char *end) {
    fprintf(to, "\"%s\": {", name);
    for (size_t n = 0; n < all->count; n++)
        fprintf(to, "%s\"%s\": %llu", n ? ", " : "", all->list[n].name, (unsigned long long)all->list[n].times);
    fprintf(to, "}%s", end);
}

static void put(FILE *to, const char *name, uint64_t value) { fprintf(to, "\"%s\": %llu, ", name, (unsigned long long)value); }

const char *state_report(void) {
    static char *text;
    static size_t length;
    size_t live_count, live_bytes, ranges, range_bytes;
    memory_totals(&live_count, &live_bytes, &ranges, &range_bytes);
    free(text);
    FILE *to = open_memstream(&text, &length);
    fprintf(to, "{\"initialised\": %s, ", is_initialised() ? "true" : "false");
    put(to, "process", (uint64_t)getpid());
    put(to, "host_to_device_bytes", counted.copied_bytes[COPY_IN]);
    put(to, "device_to_host_bytes", counted.copied_bytes[COPY_OUT]);
    put(to, "device_to_device_bytes", counted.copied_bytes[COPY_WITHIN]);
    put(to, "host_to_device_copies", counted.copies[COPY_IN]);
    put(to, "device_to_host_copies", counted.copies[COPY_OUT]);
    put(to, "device_to_device_copies", counted.copies[COPY_WITHIN]);
    put(to, "pageable_host_to_device_copies", counted.pageable_copies[0]);
    put(to, "pageable_host_to_device_bytes", counted.pageable_bytes[0]);
    put(to, "pageable_device_to_host_copies", counted.pageable_copies[1]);
    put(to, "pageable_device_to_host_bytes", counted.pageable_bytes[1]);
    put(to, "fills", counted.fills);
    put(to, "host_functions", counted.host_functions);
    put(to, "library_launches", counted.library_launches);
    put(to, "allocations", counted.allocations);
    put(to, "live_allocations", live_count);
    put(to, "live_bytes", live_bytes);
    put(to, "peak_bytes", counted.peak_bytes);
    put(to, "live_streams", live_streams());
    put(to, "live_events", live_events());
    put(to, "live_modules", live_modules());
    put(to, "registered_ranges", ranges);
    put(to, "registered_bytes", range_bytes);
    put(to, "registrations", counted.registrations);
    put(to, "registered_bytes_total", counted.registered_bytes_total);
    put(to, "sticky_error", (uint64_t)sticky_code());
    put_tallies(to, "launches", &launches, ", ");
    fprintf(to, "\"copy_priorities\": {");
    put_tallies(to, "host_to_device", &priorities[COPY_IN], ", ");
    put_tallies(to, "device_to_host", &priorities[COPY_OUT], ", ");
    put_tallies(to, "device_to_device", &priorities[COPY_WITHIN], "}, ");
    put_tallies(to, "calls", &calls, "}");
    fclose(to);
    return text;
}
