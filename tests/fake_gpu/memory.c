/* Device memory and pinned host memory. Each allocation ends at a page that cannot be touched, and its addresses are never given
   out again: what runs over an end or uses freed memory is found, and not hidden by a neighbour. */
#include "driver.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static allocation **devices, **hosts;
static size_t device_count, host_count;

typedef struct range {
    char *base;
    size_t bytes;
} range;
static range *ranges;
static size_t range_count;

enum { PAGE = 4096, ALIGNMENT = 256 };

static void append(allocation ***list, size_t *count, allocation *one) {
    *list = realloc(*list, (*count + 1) * sizeof **list);
    (*list)[(*count)++] = one;
}

allocation *new_allocation(context *owner, size_t bytes, bool device) {
    size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
    char *mapping = mmap(NULL, room + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return NULL;
    mprotect(mapping + room, PAGE, PROT_NONE);
    allocation *one = calloc(1, sizeof *one);
    one->base = device ? mapping + (room - (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT) : mapping;
    one->bytes = bytes;
    one->mapping = mapping;
    one->mapping_bytes = room + PAGE;
    one->owner = owner;
    one->live = true;
    if (!device) {
        append(&hosts, &host_count, one);
        return one;
    }
    memset(mapping, 0xA5, room);
    append(&devices, &device_count, one);
    owner->used_bytes += bytes;
    counted.allocations++;
    size_t live_count, live_bytes;
    memory_totals(&live_count, &live_bytes, NULL, NULL);
    if (live_bytes > counted.peak_bytes) counted.peak_bytes = live_bytes;
    return one;
}

static allocation *find(allocation **list, size_t count, uint64_t address) {
    for (size_t n = count; n-- > 0;)
        if (address - (uint64_t)list[n]->base < list[n]->bytes) return list[n];
    return NULL;
}

allocation *device_allocation(uint64_t address) { return find(devices, device_count, address); }
allocation *host_allocation(uint64_t address) { return find(hosts, host_count, address); }

static allocation *holding(uint64_t address, size_t bytes) {
    allocation *one = device_allocation(address);
    return one && one->live && bytes <= one->bytes - (address - (uint64_t)one->base) ? one : NULL;
}

bool device_range(uint64_t address, size_t bytes) { return holding(address, bytes) != NULL; }

bool touches_device(uint64_t address, size_t bytes) {
    for (size_t n = 0; n < device_count; n++) {
        uint64_t base = (uint64_t)devices[n]->mapping;
        if (address < base + devices[n]->mapping_bytes && base < address + bytes) return true;
    }
    return false;
}

static void give_back(allocation *one) { /* the pages go, the addresses stay taken */
    mmap(one->mapping, one->mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

void free_allocation(allocation *one) {
    one->live = false;
    if (device_allocation((uint64_t)one->base) == one) one->owner->used_bytes -= one->bytes;
    if (one->users == 0) give_back(one);
}

void free_all_of(context *owner) {
    for (size_t n = 0; n < device_count; n++)
        if (devices[n]->owner == owner && devices[n]->live) free_allocation(devices[n]);
    for (size_t n = 0; n < host_count; n++)
        if (hosts[n]->owner == owner && hosts[n]->live) free_allocation(hosts[n]);
}

allocation *use_device_range(uint64_t address, size_t bytes) {
    allocation *one = holding(address, bytes);
    if (one) one->users++;
    return one;
}

void end_use(allocation *one) {
    if (--one->users == 0 && !one->live) give_back(one);
}

CUresult register_host(char *base, size_t bytes) {
    uintptr_t first = (uintptr_t)base / PAGE * PAGE;
    if (bytes == 0 || msync((void *)first, (uintptr_t)base + bytes - first, MS_ASYNC) != 0) return CUDA_ERROR_INVALID_VALUE;
    if (touches_device((uint64_t)base, bytes)) return CUDA_ERROR_INVALID_VALUE;
    for (size_t n = 0; n < range_count; n++)
        if (base < ranges[n].base + ranges[n].bytes && ranges[n].base < base + bytes)
            return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (host_kind((uint64_t)base, bytes) != PAGEABLE) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    ranges = realloc(ranges, (range_count + 1) * sizeof *ranges);
    ranges[range_count++] = (range){base, bytes};
    counted.registrations++;
    counted.registered_bytes_total += bytes;
    return CUDA_SUCCESS;
}

CUresult unregister_host(char *base) {
    for (size_t n = 0; n < range_count; n++) {
        if (ranges[n].base != base) continue;
        ranges[n] = ranges[--range_count];
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

static enum pinned kind_in(uint64_t address, size_t bytes, uint64_t base, size_t room) {
    if (address >= base + room || base >= address + bytes) return PAGEABLE;
    return address >= base && bytes <= room - (address - base) ? PINNED : PARTLY;
}

enum pinned host_kind(uint64_t address, size_t bytes) {
    for (size_t n = 0; n < range_count; n++) {
        enum pinned kind = kind_in(address, bytes, (uint64_t)ranges[n].base, ranges[n].bytes);
        if (kind != PAGEABLE) return kind;
    }
    for (size_t n = 0; n < host_count; n++) {
        if (!hosts[n]->live) continue;
        enum pinned kind = kind_in(address, bytes, (uint64_t)hosts[n]->base, hosts[n]->bytes);
        if (kind != PAGEABLE) return kind;
    }
    return PAGEABLE;
}

void memory_totals(size_t *count, size_t *bytes, size_t *range_total, size_t *range_bytes) {
    *count = *bytes = 0;
    for (size_t n = 0; n < device_count; n++)
        if (devices[n]->live) {
            (*count)++;
            *bytes += devices[n]->bytes;
        }
    if (!range_total) return;
    *range_total = range_count;
    *range_bytes = 0;
    for (size_t n = 0; n < range_count; n++) *range_bytes += ranges[n].bytes;
}

void forget_host_ranges(void) { range_count = 0; }
