// BLAKE3 (hash mode, 32 bytes) of device memory: the name that a chunk would get, without copying it to the host.
//
// The input is cut into leaves of 1024 bytes, each hashed by itself into a chaining value of 8 words; pairs of neighbours
// are then hashed into one, level by level, an odd one at the end rising as it is, until one is left. That is the tree of
// the specification: a left side holds the largest power of two of leaves that leaves something to the right.
//
// The work is 16 compressions a leaf, some 700 instructions each, and on current GPUs takes about as long as reading the
// memory. A thread hashes a leaf, because the blocks of a leaf depend on one another and those of two leaves do not. It
// reads a block while it works on the one before: a chunk of 16 MiB has one warp for each scheduler of the GPU, with no
// other to hide the wait behind.
//
// The tree is reduced by one block of threads, since blocks cannot wait for each other. One multiprocessor alone would need
// several times as long for it as all of them for the leaves; so whoever hashes leaves also makes the first levels of them,
// and leaves it one node of eight.
//
// Nothing is included, and nothing newer than sm_70 is used. The same text is compiled by g++ in tests/fake_gpu.

typedef unsigned int Word;
typedef unsigned long long Size;

static const Word LEAF_BYTES = 1024;
static const Word BLOCK_BYTES = 64;
static const Word BLOCK_WORDS = 16;
static const Word VALUE_WORDS = 8;
static const Word DIGEST_BYTES = 32;
static const Word ROUNDS = 7;

static const Word LEAF_THREADS = 128;
static const Word GROUP_LEVELS = 3;  // more would leave most threads of a block idle for longer than the tree gains
static const Word GROUP_LEAVES = 1 << GROUP_LEVELS;
static const Word SPREAD_WORDS = 9;  // from node to node in shared memory: an odd number, so that threads use all of its banks

static const Word LEAF_START = 1;
static const Word LEAF_END = 2;
static const Word PARENT = 4;
static const Word ROOT = 8;

static __device__ __forceinline__ void set_to_initial(Word* value)
{
    value[0] = 0x6a09e667;
    value[1] = 0xbb67ae85;
    value[2] = 0x3c6ef372;
    value[3] = 0xa54ff53a;
    value[4] = 0x510e527f;
    value[5] = 0x9b05688c;
    value[6] = 0x1f83d9ab;
    value[7] = 0x5be0cd19;
}

static __device__ __forceinline__ Word rotated(Word word, Word bits)
{
    return __funnelshift_r(word, word, bits);
}

static __device__ __forceinline__ void quarter(Word& a, Word& b, Word& c, Word& d, Word first, Word second)
{
    a += b + first;
    d = rotated(d ^ a, 16);
    c += d;
    b = rotated(b ^ c, 12);
    a += b + second;
    d = rotated(d ^ a, 8);
    c += d;
    b = rotated(b ^ c, 7);
}

static __device__ __forceinline__ void mix(Word* s, const Word* m)
{
    quarter(s[0], s[4], s[8], s[12], m[0], m[1]);
    quarter(s[1], s[5], s[9], s[13], m[2], m[3]);
    quarter(s[2], s[6], s[10], s[14], m[4], m[5]);
    quarter(s[3], s[7], s[11], s[15], m[6], m[7]);
    quarter(s[0], s[5], s[10], s[15], m[8], m[9]);
    quarter(s[1], s[6], s[11], s[12], m[10], m[11]);
    quarter(s[2], s[7], s[8], s[13], m[12], m[13]);
    quarter(s[3], s[4], s[9], s[14], m[14], m[15]);
}

// The order of the message's words in the next round. All rounds are unrolled, so this only renames registers.
static __device__ __forceinline__ void permute(Word* m)
{
    const Word moved[BLOCK_WORDS] = {m[2], m[6], m[3], m[10], m[7], m[0],  m[4],  m[13],
                                     m[1], m[11], m[12], m[5], m[9], m[14], m[15], m[8]};
#pragma unroll
    for (Word index = 0; index < BLOCK_WORDS; ++index) {
        m[index] = moved[index];
    }
}

// One compression: `value` becomes the chaining value after `message`, which is used up.
static __device__ __forceinline__ void compress(Word* value, Word* message, Size counter, Word length_bytes, Word flags)
{
    Word state[BLOCK_WORDS];
    set_to_initial(state + 8);
#pragma unroll
    for (Word index = 0; index < VALUE_WORDS; ++index) {
        state[index] = value[index];
    }
    state[12] = static_cast<Word>(counter);
    state[13] = static_cast<Word>(counter >> 32);
    state[14] = length_bytes;
    state[15] = flags;
#pragma unroll
    for (Word round = 0; round < ROUNDS; ++round) {
        mix(state, message);
        permute(message);
    }
#pragma unroll
    for (Word index = 0; index < VALUE_WORDS; ++index) {
        value[index] = state[index] ^ state[index + VALUE_WORDS];
    }
}

// The words of a block of `length_bytes` bytes, zeros after its end. Words are little-endian, as the GPU's are.
static __device__ __forceinline__ void read_block(Word* message, const unsigned char* place, Word length_bytes)
{
    if (length_bytes == BLOCK_BYTES && reinterpret_cast<Size>(place) % sizeof(uint4) == 0) {
        const uint4* quads = reinterpret_cast<const uint4*>(place);
#pragma unroll
        for (Word index = 0; index < BLOCK_WORDS / 4; ++index) {
            const uint4 quad = quads[index];
            message[4 * index] = quad.x;
            message[4 * index + 1] = quad.y;
            message[4 * index + 2] = quad.z;
            message[4 * index + 3] = quad.w;
        }
        return;
    }
#pragma unroll
    for (Word index = 0; index < BLOCK_WORDS; ++index) {
        message[index] = 0;
#pragma unroll
        for (Word byte = 0; byte < 4; ++byte) {
            if (4 * index + byte < length_bytes) {
                message[index] |= static_cast<Word>(place[4 * index + byte]) << (8 * byte);
            }
        }
    }
}

static __device__ __forceinline__ void copy_words(Word* target, const Word* source, Word count)
{
#pragma unroll
    for (Word index = 0; index < count; ++index) {
        target[index] = source[index];
    }
}

// The chaining value of one leaf: `length_bytes` bytes (0 to 1024) from `data` on, the root's where it is all there is.
static __device__ __forceinline__ void hash_leaf(
    Word* value, const unsigned char* data, Word length_bytes, Size counter, Word root)
{
    const Word last = length_bytes == 0 ? 0 : (length_bytes - 1) / BLOCK_BYTES;
    set_to_initial(value);
    Word message[BLOCK_WORDS];
    Word ahead[BLOCK_WORDS];
    // One turn more than blocks, so that reading has one place in the code: each turn reads a block and hashes the one before.
#pragma unroll 1
    for (Word turn = 0; turn <= last + 1; ++turn) {
        copy_words(message, ahead, BLOCK_WORDS);
        if (turn <= last) {
            read_block(ahead, data + turn * BLOCK_BYTES, turn < last ? BLOCK_BYTES : length_bytes - turn * BLOCK_BYTES);
        }
        if (turn > 0) {
            const Word block = turn - 1;
            const Word block_bytes = block < last ? BLOCK_BYTES : length_bytes - block * BLOCK_BYTES;
            const Word flags = (block == 0 ? LEAF_START : 0) | (block == last ? LEAF_END | root : 0);
            compress(value, message, counter, block_bytes, flags);
        }
    }
}

// One level of the tree, by all threads of a block: `count` nodes, STRIDE words apart, become half as many in the same place.
template <Word STRIDE>
static __device__ __forceinline__ void reduce_level(Word* nodes, Size count, Word flags)
{
    const Size parent_count = (count + 1) / 2;
    // Parents take the places of nodes that threads of the same turn may still have to read, never of later ones.
#pragma unroll 1
    for (Size first = 0; first < parent_count; first += blockDim.x) {
        const Size parent = first + threadIdx.x;
        Word value[VALUE_WORDS];
        if (parent < parent_count) {
            const Word* left = nodes + 2 * parent * STRIDE;
            if (2 * parent + 1 < count) {
                Word message[BLOCK_WORDS];
                copy_words(message, left, VALUE_WORDS);
                copy_words(message + VALUE_WORDS, left + STRIDE, VALUE_WORDS);
                set_to_initial(value);
                compress(value, message, 0, BLOCK_BYTES, flags);
            } else {
                copy_words(value, left, VALUE_WORDS);
            }
        }
        __syncthreads();
        if (parent < parent_count) {
            copy_words(nodes + parent * STRIDE, value, VALUE_WORDS);
        }
        __syncthreads();
    }
}

static __device__ __forceinline__ Word parent_flags(Size count)
{
    return count == 2 ? PARENT | ROOT : PARENT;
}

// data:        length_bytes bytes at any address; fast where it is a multiple of 16.
// chaining:    8 words for each group of 8 leaves, the last one may have fewer. A single leaf or group gets the root's value.
// The grid has one thread for each leaf at least, 128 a block (fewer are right, if a multiple of 8): small blocks spread a
// chunk over all multiprocessors.
extern "C" __global__ void __launch_bounds__(LEAF_THREADS) coldstart_blake3_leaves(
    const unsigned char* data, unsigned long long length_bytes, unsigned int* chaining)
{
    __shared__ Word nodes[LEAF_THREADS * SPREAD_WORDS];
    const Size leaf_count = length_bytes == 0 ? 1 : (length_bytes - 1) / LEAF_BYTES + 1;
    const Size first = static_cast<Size>(blockIdx.x) * blockDim.x;
    if (first >= leaf_count) {
        return;
    }
    const Size leaf = first + threadIdx.x;
    if (leaf < leaf_count) {
        const Size begin = leaf * LEAF_BYTES;
        const Size left = length_bytes - begin;
        Word value[VALUE_WORDS];
        hash_leaf(
            value, data + begin, left < LEAF_BYTES ? static_cast<Word>(left) : LEAF_BYTES, leaf, leaf_count == 1 ? ROOT : 0);
        copy_words(nodes + threadIdx.x * SPREAD_WORDS, value, VALUE_WORDS);
    }
    __syncthreads();
    Size count = leaf_count;  // of the whole tree's level
    Word here = leaf_count - first < blockDim.x ? static_cast<Word>(leaf_count - first) : blockDim.x;
#pragma unroll 1
    for (Word level = 0; level < GROUP_LEVELS; ++level) {
        reduce_level<SPREAD_WORDS>(nodes, here, parent_flags(count));
        count = (count + 1) / 2;
        here = (here + 1) / 2;
    }
    unsigned int* place = chaining + first / GROUP_LEAVES * VALUE_WORDS;
    for (Word word = threadIdx.x; word < here * VALUE_WORDS; word += blockDim.x) {
        place[word] = nodes[word / VALUE_WORDS * SPREAD_WORDS + word % VALUE_WORDS];
    }
}

// chaining:    what the leaves gave; used up.
// leaf_count:  the number of leaves, not of their groups.
// digest:      32 bytes at any address.
// The grid is one block of any number of threads; 512 are good.
extern "C" __global__ void __launch_bounds__(512) coldstart_blake3_tree(
    unsigned int* chaining, unsigned long long leaf_count, unsigned char* digest)
{
#pragma unroll 1
    for (Size count = (leaf_count + GROUP_LEAVES - 1) / GROUP_LEAVES; count > 1; count = (count + 1) / 2) {
        reduce_level<VALUE_WORDS>(chaining, count, parent_flags(count));
    }
    for (Word byte = threadIdx.x; byte < DIGEST_BYTES; byte += blockDim.x) {
        digest[byte] = static_cast<unsigned char>(chaining[byte / 4] >> (8 * (byte % 4)));
    }
}
