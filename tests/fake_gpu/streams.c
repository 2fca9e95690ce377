/* Each stream is a thread with a queue. Nothing happens at the call that asks for it: copies read and write when their stream gets
   to them, so whoever reuses a buffer too early sees it here as on a GPU. */
#include "driver.h"
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t state_changed = PTHREAD_COND_INITIALIZER;
__thread bool in_host_function;
__thread context *context_of_operation;

static stream **streams;
static size_t stream_count;

/* A fault in an operation is the context's illegal address, not this process's end. */
static __thread sigjmp_buf *landing;
static struct sigaction before_segv, before_bus;

static void on_fault(int signal_number, siginfo_t *information, void *place) {
    if (landing) siglongjmp(*landing, 1);
    struct sigaction *before = signal_number == SIGSEGV ? &before_segv : &before_bus;
    if (before->sa_flags & SA_SIGINFO) before->sa_sigaction(signal_number, information, place);
    else if (before->sa_handler != SIG_DFL && before->sa_handler != SIG_IGN) before->sa_handler(signal_number);
    else sigaction(signal_number, before, NULL); /* it happens again, and ends the process */
}

void guard_against_faults(void) {
    static bool installed; /* once: another copy of this library may have put its own before it meanwhile */
    struct sigaction mine;
    if (installed) return;
    installed = true;
    memset(&mine, 0, sizeof mine);
    mine.sa_sigaction = on_fault;
    mine.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigaction(SIGSEGV, &mine, &before_segv);
    sigaction(SIGBUS, &mine, &before_bus);
}

static void pause_a_little(stream *in) {
    in->random ^= in->random << 13, in->random ^= in->random >> 7, in->random ^= in->random << 17;
    uint64_t drawn = in->random >> 11;
    usleep(drawn % 16 == 0 ? 2000 : drawn / 16 % 200); /* mostly short, now and then longer than many other operations */
}

static double now_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

typedef struct used {
    allocation *list[MAX_ARGUMENTS + 2];
    int count;
} used;

static bool hold(used *all, const void *address, size_t bytes) {
    allocation *one = use_device_range((uint64_t)address, bytes);
    if (one) all->list[all->count++] = one;
    return one != NULL;
}

/* With the lock held: the device memory that the operation names, or false where it is not there any more. */
static bool hold_memory(operation *one, used *all) {
    if (one->kind <= FILL && one->bytes == 0) return true;
    if ((one->kind == COPY_IN || one->kind == COPY_WITHIN || one->kind == FILL) && !hold(all, one->target, one->bytes)) return false;
    if ((one->kind == COPY_OUT || one->kind == COPY_WITHIN) && !hold(all, one->source, one->bytes)) return false;
    if (one->pinned && host_kind((uint64_t)(one->kind == COPY_IN ? one->source : one->target), one->bytes) != PINNED) return false;
    for (int n = 0; one->kind == KERNEL && n < one->argument_count; n++) {
        uint64_t value = 0;
        if (one->argument_bytes[n] != sizeof value) continue;
        memcpy(&value, one->arguments[n], sizeof value);
        allocation *named = device_allocation(value);
        if (named && !hold(all, (void *)value, 1)) return false;
    }
    return true;
}

static CUresult run_guarded(operation *one) {
    switch (one->kind) {
    case COPY_IN: memcpy(one->target, one->staged ? one->staged : one->source, one->bytes); break;
    case COPY_OUT: memcpy(one->target, one->source, one->bytes); break;
    case COPY_WITHIN: memmove(one->target, one->source, one->bytes); break;
    case FILL: memset(one->target, one->value, one->bytes); break;
    case CALL:
        in_host_function = true;
        one->call(one->data);
        in_host_function = false;
        break;
    case WORK: one->call(one->data); break;
    case KERNEL: {
        emulator emulate = find_emulator();
        if (!emulate || emulate(one->name, one->grid[0], one->grid[1], one->grid[2], one->block[0], one->block[1], one->block[2],
                                one->shared_bytes, one->arguments) != 0) {
            fprintf(stderr, "fake driver: the kernel %s could not be emulated\n", one->name);
            return CUDA_ERROR_LAUNCH_FAILED;
        }
        break;
    }
    default: break;
    }
    return CUDA_SUCCESS;
}

static CUresult run(operation *one) {
    sigjmp_buf here;
    if (one->kind == CALL) return run_guarded(one); /* host code: its faults are its own */
    if (sigsetjmp(here, 1)) {
        landing = NULL;
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    landing = &here;
    CUresult code = run_guarded(one);
    landing = NULL;
    return code;
}

static void count(stream *in, operation *one) {
    if (one->kind <= COPY_WITHIN) {
        counted.copied_bytes[one->kind] += one->bytes;
        counted.copies[one->kind]++;
        count_copy_priority(one->kind, in->priority);
    }
    if (one->kind == FILL) counted.fills++;
    if (one->kind == CALL) counted.host_functions++;
    if (one->kind == WORK) counted.library_launches++;
    if (one->kind == KERNEL) count_launch(one->name);
}

static void perform(stream *in, operation *one) {
    used all = {.count = 0};
    CUresult code = in->owner->sticky;
    if (!code && !hold_memory(one, &all)) code = CUDA_ERROR_ILLEGAL_ADDRESS;
    pthread_mutex_unlock(&state_lock);
    if (!code) code = run(one);
    pthread_mutex_lock(&state_lock);
    for (int n = 0; n < all.count; n++) {
        if (!all.list[n]->live) code = CUDA_ERROR_ILLEGAL_ADDRESS; /* freed while it was used */
        end_use(all.list[n]);
    }
    if (!code) count(in, one);
    if (code && !in->owner->sticky) in->owner->sticky = code;
    if (one->kind == RECORD && one->event->recorded_in == in && one->event->recorded_at == one->sequence)
        one->event->seconds = now_seconds();
}

static void forget(operation *one) {
    for (int n = 0; n < one->argument_count; n++) free(one->arguments[n]);
    free(one->needs);
    free(one->staged);
    free(one);
}

static void *work(void *argument) {
    stream *mine = argument;
    context_of_operation = mine->owner;
    pthread_mutex_lock(&state_lock);
    for (;;) {
        while (!mine->first && !mine->ending) pthread_cond_wait(&state_changed, &state_lock);
        operation *one = mine->first;
        if (!one) break;
        for (int n = 0; n < one->need_count; n++) wait_for(one->needs[n].stream, one->needs[n].sequence);
        if (settings.jitter) {
            pthread_mutex_unlock(&state_lock);
            pause_a_little(mine);
            pthread_mutex_lock(&state_lock);
        }
        perform(mine, one);
        mine->first = one->next;
        if (!mine->first) mine->last = NULL;
        mine->done = one->sequence;
        forget(one);
        pthread_cond_broadcast(&state_changed);
    }
    pthread_mutex_unlock(&state_lock);
    return NULL;
}

stream *new_stream(context *owner, int priority, bool blocking) {
    stream *made = calloc(1, sizeof *made);
    *made = (stream){.owner = owner, .priority = priority, .blocking = blocking, .alive = true};
    made->random = (settings.seed + 1) * 0x9E3779B97F4A7C15ull + stream_count * 0xBF58476D1CE4E5B9ull + 1;
    sigset_t all, before; /* signals are for the threads of the program */
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&made->thread, NULL, work, made);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        free(made);
        return NULL;
    }
    streams = realloc(streams, (stream_count + 1) * sizeof *streams);
    streams[stream_count++] = made;
    return made;
}

stream *default_stream(context *owner) {
    if (!owner->default_stream) owner->default_stream = new_stream(owner, 0, false);
    return owner->default_stream;
}

operation *new_operation(enum kind kind) {
    operation *made = calloc(1, sizeof *made);
    made->kind = kind;
    return made;
}

void add_need(operation *one, stream *of, uint64_t sequence) {
    if (of->done >= sequence) return;
    one->needs = realloc(one->needs, (one->need_count + 1) * sizeof *one->needs);
    one->needs[one->need_count++] = (dependency){of, sequence};
}

uint64_t enqueue(stream *in, operation *one) {
    context *owner = in->owner;
    if (in == owner->default_stream) { /* the default stream takes turns with the blocking ones */
        for (size_t n = 0; n < stream_count; n++)
            if (streams[n]->owner == owner && streams[n]->blocking) add_need(one, streams[n], streams[n]->enqueued);
    } else if (in->blocking && owner->default_stream) {
        add_need(one, owner->default_stream, owner->default_stream->enqueued);
    }
    uint64_t sequence = one->sequence = ++in->enqueued;
    if (in->last) in->last->next = one;
    else in->first = one;
    in->last = one;
    pthread_cond_broadcast(&state_changed);
    return sequence;
}

void wait_for(stream *of, uint64_t sequence) {
    while (of->done < sequence) pthread_cond_wait(&state_changed, &state_lock);
}

void wait_for_context(context *owner) {
    for (size_t n = 0; n < stream_count; n++)
        if (streams[n]->owner == owner) wait_for(streams[n], streams[n]->enqueued);
}

void end_streams_of(context *owner) {
    wait_for_context(owner);
    for (size_t n = 0; n < stream_count; n++)
        if (streams[n]->owner == owner && !streams[n]->ending) {
            streams[n]->alive = false;
            streams[n]->ending = true;
            pthread_detach(streams[n]->thread);
        }
    owner->default_stream = NULL;
    pthread_cond_broadcast(&state_changed);
}

size_t live_streams(void) {
    size_t live = 0;
    for (size_t n = 0; n < stream_count; n++) live += streams[n]->alive && streams[n] != streams[n]->owner->default_stream;
    return live;
}
