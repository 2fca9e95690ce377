// The kernels of coldstart on the CPU: the same .cu files, with what CUDA gives them made of plain C++.
//
// Threads of a kernel without barriers run one after another. Those of one with barriers are fibres: each runs to its next
// barrier, then the next one does. They go forwards and backwards in turn, so that a missing barrier shows in the result,
// and a barrier that some threads of a block never reach is an error, where a GPU might hang.
//
// What is not emulated: that threads run at once, and what memory they see of each other between barriers.

#include <cstring>
#include <ucontext.h>
#include <vector>

namespace {

struct Dimensions {
    unsigned int x, y, z;
};

// Of the thread that runs now. Several launches may run at once, each in a thread of the system.
thread_local Dimensions threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};

uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w)
{
    return {x, y, z, w};
}

unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int bits)
{
    const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
    return static_cast<unsigned int>(both >> (bits & 31));
}

unsigned int __byte_perm(unsigned int first, unsigned int second, unsigned int selector)
{
    const unsigned long long both = static_cast<unsigned long long>(second) << 32 | first;
    unsigned int result = 0;
    for (unsigned int byte = 0; byte < 4; ++byte) {
        const unsigned int picked = selector >> (4 * byte) & 7;
        result |= static_cast<unsigned int>(both >> (8 * picked) & 0xff) << (8 * byte);
    }
    return result;
}

void __syncthreads();

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static thread_local

namespace planes {
#include "../../coldstart/devices/kernels/planes.cu"
}
namespace blake3 {
#include "../../coldstart/devices/kernels/blake3.cu"
}

template <typename Value>
Value argument(void** arguments, int index)
{
    Value value;
    std::memcpy(&value, arguments[index], sizeof value);
    return value;
}

typedef unsigned long long Number;
typedef unsigned char Byte;

void merge_planes(void** given)
{
    planes::coldstart_merge_planes(
        argument<Byte*>(given, 0), argument<const Number*>(given, 1), argument<Number>(given, 2),
        argument<unsigned int>(given, 3), argument<unsigned int>(given, 4), argument<unsigned int>(given, 5));
}

void blake3_leaves(void** given)
{
    blake3::coldstart_blake3_leaves(
        argument<const Byte*>(given, 0), argument<Number>(given, 1), argument<unsigned int*>(given, 2));
}

void blake3_tree(void** given)
{
    blake3::coldstart_blake3_tree(
        argument<unsigned int*>(given, 0), argument<Number>(given, 1), argument<Byte*>(given, 2));
}

struct Kernel {
    const char* name;
    void (*run)(void**);
    unsigned int largest_block;  // as the kernel's __launch_bounds__ says
    bool has_barriers;
};

const Kernel KERNELS[] = {
    {"coldstart_merge_planes", merge_planes, 256, false},
    {"coldstart_blake3_leaves", blake3_leaves, 128, true},
    {"coldstart_blake3_tree", blake3_tree, 512, true},
};

Dimensions thread_at(unsigned int index)
{
    return {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
}

const std::size_t STACK_BYTES = 64 << 10;

struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    bool waits;  // at a barrier; false once its thread has ended
};

// The threads of the block that runs now.
struct Block {
    const Kernel* kernel;
    void** arguments;
    std::vector<Fibre> fibres;
    ucontext_t scheduler;
    Fibre* running;
};

thread_local Block* block;

void run_fibre()
{
    block->kernel->run(block->arguments);
    block->running->waits = false;
}

void __syncthreads()
{
    Fibre* fibre = block->running;
    fibre->waits = true;
    swapcontext(&fibre->context, &block->scheduler);
}

void prepare(Fibre& fibre)
{
    fibre.stack.resize(STACK_BYTES);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = &block->scheduler;
    makecontext(&fibre.context, run_fibre, 0);
}

// Runs all fibres to their next barrier or their end; how many wait at a barrier.
std::size_t run_to_barrier(bool backwards)
{
    std::size_t waiting = 0;
    const std::size_t count = block->fibres.size();
    for (std::size_t turn = 0; turn < count; ++turn) {
        const std::size_t index = backwards ? count - 1 - turn : turn;
        block->running = &block->fibres[index];
        threadIdx = thread_at(static_cast<unsigned int>(index));
        swapcontext(&block->scheduler, &block->running->context);
        waiting += block->running->waits;
    }
    return waiting;
}

bool run_block_with_barriers()
{
    for (Fibre& fibre : block->fibres) {
        prepare(fibre);
    }
    bool backwards = false;
    std::size_t waiting;
    while ((waiting = run_to_barrier(backwards)) == block->fibres.size()) {
        backwards = !backwards;
    }
    return waiting == 0;
}

void run_block_without_barriers()
{
    for (unsigned int index = 0; index < block->fibres.size(); ++index) {
        threadIdx = thread_at(index);
        block->kernel->run(block->arguments);
    }
}

// What cuLaunchKernel answers.
enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

const Kernel* find(const char* name)
{
    for (const Kernel& kernel : KERNELS) {
        if (std::strcmp(kernel.name, name) == 0) {
            return &kernel;
        }
    }
    return nullptr;
}

bool every_block_ends()
{
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
                if (!block->kernel->has_barriers) {
                    run_block_without_barriers();
                } else if (!run_block_with_barriers()) {
                    return false;
                }
            }
        }
    }
    return true;
}

}  // namespace

// Runs a kernel over a grid and returns when it is done. `arguments` are what cuLaunchKernel gets: the address of the value of
// each; addresses of device memory are those of host memory. The answer is cuLaunchKernel's: 0, or the number of its error.
extern "C" int coldstart_emulate(
    const char* name, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
    unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, void** arguments)
{
    const Kernel* kernel = find(name);
    if (kernel == nullptr) {
        return NOT_FOUND;
    }
    const unsigned long long threads = 1ull * block_x * block_y * block_z;
    if (threads == 0 || threads > kernel->largest_block || 1ull * grid_x * grid_y * grid_z == 0 || shared_bytes > 48 << 10) {
        return INVALID_VALUE;
    }
    gridDim = {grid_x, grid_y, grid_z};
    blockDim = {block_x, block_y, block_z};
    Block current{kernel, arguments, std::vector<Fibre>(threads), {}, nullptr};
    block = &current;
    return every_block_ends() ? SUCCESS : LAUNCH_FAILED;
}
