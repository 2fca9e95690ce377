// Puts the bytes of all planes of a chunk in their places: the last step of `planes+zstd` (coldstart/codecs/planes.py).
//
// All that this kernel does is move memory, so it is built around its accesses. For items of 2 and 4 bytes, the ones that are
// worth planes, a thread makes whole stores of 16 bytes, side by side with those of its neighbours, and reads each plane in
// words of 4 bytes. Blocks that were stored as they are lie wherever their chunk had them, so a plane may begin at any address:
// words are then read at the aligned addresses around it, and shifted. That reads up to 3 bytes before and after a block, never a
// word that holds none of its bytes: so it stays inside of any memory that is handed out in whole words. The few items at the
// edges of a target, which no whole store covers, go byte by byte; so do items of any other size, for which nobody should wait
// at a start until more code is compiled.
//
// Any grid is right. A good one has 256 threads in x, one row of it (grid y) for each block of a plane, and as many columns
// (grid x) that a thread makes about four stores: the addresses that it reads first cost as much as one.
//
// Nothing is included, and nothing newer than sm_70 is used. The same text is compiled by g++ in tests/fake_gpu.

typedef unsigned int Word;
typedef unsigned long long Size;  // bytes, items, and addresses as the caller passes them

static const Word STORE_BYTES = 16;
static const Word WORD_BYTES = 4;

// What a thread makes of one store: `items` items, of which each plane gives `words` words.
template <Word ITEM_BYTES>
struct Unit {
    static const Word items = STORE_BYTES / ITEM_BYTES;
    static const Word words = items / WORD_BYTES;
};

static __device__ __forceinline__ Word offset_in(const unsigned char* address, Word boundary)
{
    return static_cast<Word>(reinterpret_cast<Size>(address) % boundary);
}

// Reads COUNT words from `place` on. Without branches, so that the words of all planes are on their way before one is needed.
template <Word COUNT>
static __device__ __forceinline__ void read_words(Word* words, const unsigned char* place)
{
    const Word skipped = offset_in(place, WORD_BYTES);
    const Word* aligned = reinterpret_cast<const Word*>(place - skipped);
    Word read[COUNT + 1];
#pragma unroll
    for (Word index = 0; index < COUNT; ++index) {
        read[index] = aligned[index];
    }
    read[COUNT] = aligned[skipped == 0 ? 0 : COUNT];  // not needed at an aligned place, where none may be left to read
#pragma unroll
    for (Word index = 0; index < COUNT; ++index) {
        words[index] = __funnelshift_r(read[index], read[index + 1], 8 * skipped);
    }
}

// The words of two planes to those of items of two bytes. The digits of a selector pick bytes, least significant first: 0 to 3
// from the first word, 4 to 7 from the second.
static __device__ __forceinline__ uint4 interleaved(const Word (&planes)[2][2])
{
    return make_uint4(
        __byte_perm(planes[0][0], planes[1][0], 0x5140), __byte_perm(planes[0][0], planes[1][0], 0x7362),
        __byte_perm(planes[0][1], planes[1][1], 0x5140), __byte_perm(planes[0][1], planes[1][1], 0x7362));
}

// The words of four planes to those of items of four bytes: first to pairs of bytes, then to pairs of pairs.
static __device__ __forceinline__ uint4 interleaved(const Word (&planes)[4][1])
{
    const Word low_01 = __byte_perm(planes[0][0], planes[1][0], 0x5140);
    const Word high_01 = __byte_perm(planes[0][0], planes[1][0], 0x7362);
    const Word low_23 = __byte_perm(planes[2][0], planes[3][0], 0x5140);
    const Word high_23 = __byte_perm(planes[2][0], planes[3][0], 0x7362);
    return make_uint4(
        __byte_perm(low_01, low_23, 0x5410), __byte_perm(low_01, low_23, 0x7632), __byte_perm(high_01, high_23, 0x5410),
        __byte_perm(high_01, high_23, 0x7632));
}

template <Word ITEM_BYTES>
static __device__ __forceinline__ void merge_items(
    unsigned char* target, const unsigned char* const* sources, Size begin, Size end, Word step)
{
#pragma unroll 1
    for (Size item = begin; item < end; item += step) {
#pragma unroll
        for (Word plane = 0; plane < ITEM_BYTES; ++plane) {
            target[item * ITEM_BYTES + plane] = sources[plane][item];
        }
    }
}

template <Word ITEM_BYTES>
static __device__ __forceinline__ void merge_unit(unsigned char* target, const unsigned char* const* sources, Size first)
{
    Word planes[ITEM_BYTES][Unit<ITEM_BYTES>::words];
#pragma unroll
    for (Word plane = 0; plane < ITEM_BYTES; ++plane) {
        read_words<Unit<ITEM_BYTES>::words>(planes[plane], sources[plane] + first);
    }
    *reinterpret_cast<uint4*>(target + first * ITEM_BYTES) = interleaved(planes);
}

// Items before the first one that begins at a boundary of 16 bytes; all of them where none does.
template <Word ITEM_BYTES>
static __device__ __forceinline__ Size items_to_boundary(const unsigned char* target, Size item_count)
{
    const Word missing = (STORE_BYTES - offset_in(target, STORE_BYTES)) % STORE_BYTES;
    if (missing % ITEM_BYTES != 0 || item_count < missing / ITEM_BYTES) {
        return item_count;
    }
    return missing / ITEM_BYTES;
}

// One block of every plane. `blocks` holds that of plane 0, and `block_count` addresses on that of the next one.
template <Word ITEM_BYTES>
static __device__ __forceinline__ void merge_block(unsigned char* target, const Size* blocks, Word block_count, Size item_count)
{
    const unsigned char* sources[ITEM_BYTES];
#pragma unroll
    for (Word plane = 0; plane < ITEM_BYTES; ++plane) {
        sources[plane] = reinterpret_cast<const unsigned char*>(blocks[static_cast<Size>(plane) * block_count]);
    }
    const Word unit_items = Unit<ITEM_BYTES>::items;
    const Word threads = gridDim.x * blockDim.x;
    const Word thread = blockIdx.x * blockDim.x + threadIdx.x;
    const Size head = items_to_boundary<ITEM_BYTES>(target, item_count);
    const Word units = static_cast<Word>((item_count - head) / unit_items);
    const Size tail = head + static_cast<Size>(units) * unit_items;
#pragma unroll 1
    for (Word unit = thread; unit < units; unit += threads) {
        merge_unit<ITEM_BYTES>(target, sources, head + static_cast<Size>(unit) * unit_items);
    }
    merge_items<ITEM_BYTES>(target, sources, thread, head, threads);
    merge_items<ITEM_BYTES>(target, sources, tail + thread, item_count, threads);
}

static __device__ __forceinline__ void merge_block_of_any(
    unsigned char* target, const Size* blocks, Word block_count, Size item_count, Word item_bytes)
{
    const Word threads = gridDim.x * blockDim.x;
#pragma unroll 1
    for (Size item = blockIdx.x * blockDim.x + threadIdx.x; item < item_count; item += threads) {
#pragma unroll 1
        for (Word plane = 0; plane < item_bytes; ++plane) {
            const Size block = blocks[static_cast<Size>(plane) * block_count];
            target[item * item_bytes + plane] = reinterpret_cast<const unsigned char*>(block)[item];
        }
    }
}

// target:      plane_bytes * item_bytes bytes; byte `item * item_bytes + plane` becomes byte `item` of `plane`.
// blocks:      blocks[plane * block_count + n] is the address of the raw bytes of block n of a plane.
// plane_bytes: the length of each plane, that is the number of items.
// block_bytes: the length of each block of a plane but the last one, which has what is left.
extern "C" __global__ void __launch_bounds__(256) coldstart_merge_planes(
    unsigned char* target, const unsigned long long* blocks, unsigned long long plane_bytes, unsigned int block_bytes,
    unsigned int block_count, unsigned int item_bytes)
{
#pragma unroll 1
    for (Word number = blockIdx.y; number < block_count; number += gridDim.y) {
        const Size begin = static_cast<Size>(number) * block_bytes;
        if (begin >= plane_bytes) {
            return;
        }
        const Size left = plane_bytes - begin;
        const Size item_count = left < block_bytes ? left : block_bytes;
        unsigned char* place = target + begin * item_bytes;
        if (item_bytes == 2) {
            merge_block<2>(place, blocks + number, block_count, item_count);
        } else if (item_bytes == 4) {
            merge_block<4>(place, blocks + number, block_count, item_count);
        } else {
            merge_block_of_any(place, blocks + number, block_count, item_count, item_bytes);
        }
    }
}
