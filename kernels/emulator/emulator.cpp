// The machine behind emulator.h: fibres, their order, and what is checked at each access to memory.
//
//   outside      an access that is in no argument, not in shared memory, not on the thread's own stack
//   race         two threads of a block touch a byte between the same two barriers, or two blocks touch it at all,
//                and one of them writes (atomics among themselves may)
//   divergence   threads of a block wait at different barriers, or some have left; the same for shuffles of a warp
//
// A fibre that finishes its thread goes on with the next thread itself: a kernel without barriers never switches.

#include "emulator.h"
#include <algorithm>
#include <cstdio>
#include <link.h>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

namespace emulator {
dim3 thread, block, block_size, grid_size;

namespace {
constexpr std::size_t STACK = 64 << 10;
enum State { FREE, RUNNING, AT_BARRIER, AT_SHUFFLE };
struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = FREE;
    unsigned number = 0;                    // of its thread in the block
    int line = 0;
    unsigned mask = 0;                      // of a shuffle
    int from = 0;
    std::uint64_t bits = 0;
};
// What is remembered of a byte: who wrote it and who read it last, and when. Time goes on at each barrier.
struct Byte { std::uint32_t writer, written, reader, read; };
constexpr std::uint32_t SEVERAL = ~0u;
struct Region { char* begin; char* end; Byte* bytes; const char* name; int index; bool writable; };

std::vector<std::unique_ptr<Fibre>> fibres;
Fibre* current;
ucontext_t scheduler;
std::vector<unsigned> order;                // of the threads
std::size_t next_thread;
std::vector<State> state_of;                // by thread; FREE: not begun or finished
std::vector<Fibre*> fibre_of;
std::vector<bool> finished;
std::vector<Region> regions;
std::size_t recent;
std::uint32_t now, block_began, who;
bool failed, in_atomic, checked;
char* report;
std::size_t report_size;
void* place;                                // the instruction that was stopped
const Value* values;
void (*entry)(const Value*);

unsigned count() { return block_size.x * block_size.y * block_size.z; }
void take_place(Fibre* f) {
    current = f;
    who = 1 + f->number;
    thread = dim3(f->number % block_size.x, f->number / block_size.x % block_size.y, f->number / (block_size.x * block_size.y));
}
std::string name_of(unsigned t) {
    std::string s = "thread " + std::to_string(t % block_size.x);
    if (block_size.y * block_size.z > 1) s += "," + std::to_string(t / block_size.x % block_size.y) + "," + std::to_string(t / (block_size.x * block_size.y));
    return s;
}
std::string block_name() {
    std::string s = "block " + std::to_string(block.x);
    if (grid_size.y * grid_size.z > 1) s += "," + std::to_string(block.y) + "," + std::to_string(block.z);
    return s;
}
void fail(const std::string& why) {
    if (failed) return;
    failed = true;
    std::snprintf(report, report_size, "%s", why.c_str());
}
void body() {
    for (;;) {
        while (next_thread < order.size() && !failed) {
            current->number = order[next_thread++];
            fibre_of[current->number] = current;
            take_place(current);
            entry(values);
            finished[current->number] = true;
        }
        current->state = FREE;
        swapcontext(&current->context, &scheduler);
    }
}
void wait(State state, int line) {
    current->state = state;
    current->line = line;
    Fibre* self = current;
    swapcontext(&self->context, &scheduler);
}
void resume(Fibre* f) {
    f->state = RUNNING;
    take_place(f);
    swapcontext(&scheduler, &f->context);
}
Fibre* fresh(std::size_t i) {
    if (i == fibres.size()) {
        auto f = std::make_unique<Fibre>();
        f->stack = std::make_unique<char[]>(STACK);
        fibres.push_back(std::move(f));
    }
    Fibre* f = fibres[i].get();
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack.get();
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, body, 0);
    return f;
}
// Shuffles of warps whose lanes have all arrived: exchange and run on. True if there was one.
bool shuffles(std::vector<Fibre*>& waiting) {
    bool any = false;
    for (unsigned first = 0; first < count() && !failed; first += 32) {
        Fibre* lanes[32] = {};
        unsigned here = 0;
        for (Fibre* f : waiting)
            if (f->state == AT_SHUFFLE && f->number / 32 == first / 32) { lanes[f->number % 32] = f; here |= 1u << f->number % 32; }
        for (int l = 0; l < 32; ++l) {
            Fibre* f = lanes[l];
            if (!f || f->state != AT_SHUFFLE) continue;
            unsigned exist = count() - first >= 32 ? ~0u : (1u << (count() - first)) - 1, wanted = f->mask & exist;
            bool together = (wanted & ~here) == 0;
            for (int o = 0; o < 32 && together; ++o)
                if (wanted >> o & 1) together = lanes[o] && lanes[o]->line == f->line && lanes[o]->mask == f->mask;
            if (!together) continue;
            std::uint64_t bits[32];
            for (int o = 0; o < 32; ++o) bits[o] = lanes[o] ? lanes[o]->bits : 0;
            for (int o = 0; o < 32; ++o)
                if (wanted >> o & 1) {
                    int from = lanes[o]->from;
                    lanes[o]->bits = from >= 0 && from < 32 && (wanted >> from & 1) ? bits[from] : bits[o];
                    lanes[o]->state = RUNNING;
                }
            any = true;
        }
    }
    return any;
}
void diverged(const std::vector<Fibre*>& waiting) {
    const Fibre* a = waiting[0];
    const char* what = a->state == AT_BARRIER ? "waits at the barrier" : "waits at the warp shuffle";
    std::string start = "divergence in " + block_name() + ": " + name_of(a->number) + " " + what + " of line " + std::to_string(a->line) + ", ";
    for (const Fibre* f : waiting)
        if (f->state != a->state || f->line != a->line)
            return fail(start + name_of(f->number) + (f->state == AT_BARRIER ? " at the barrier" : " at the warp shuffle") + " of line " + std::to_string(f->line));
    for (unsigned t = 0; t < count(); ++t)
        if (finished[t]) return fail(start + name_of(t) + " has left the kernel");
    fail(start + "and the threads that it waits for do not come");
}
void run_block(std::mt19937& random, int ordering) {
    order.resize(count());
    std::iota(order.begin(), order.end(), 0);
    if (ordering == 1) std::reverse(order.begin(), order.end());
    if (ordering > 1) std::shuffle(order.begin(), order.end(), random);
    next_thread = 0;
    finished.assign(count(), false);
    fibre_of.assign(count(), nullptr);
    block_began = ++now;
    std::size_t used = 0;
    while (next_thread < order.size() && !failed) {    // each fibre takes threads until one waits
        Fibre* f = fresh(used++);
        resume(f);
    }
    while (!failed) {
        std::vector<Fibre*> waiting;
        for (unsigned t : order)
            if (fibre_of[t] && !finished[t]) waiting.push_back(fibre_of[t]);
        if (waiting.empty()) break;
        if (shuffles(waiting)) {
            for (Fibre* f : waiting)
                if (f->state == RUNNING && !failed) resume(f);
            continue;
        }
        bool all = waiting.size() == count();
        for (Fibre* f : waiting) all = all && f->state == AT_BARRIER && f->line == waiting[0]->line;
        if (!all) { diverged(waiting); break; }
        ++now;
        if (ordering > 1) std::shuffle(waiting.begin(), waiting.end(), random);
        for (Fibre* f : waiting)
            if (!failed) resume(f);
    }
}

[[noreturn]] void stop_here(const std::string& why, void* at) {
    place = at;
    fail(why);
    setcontext(&scheduler);                 // this fibre is left as it is
    __builtin_unreachable();
}
void conflict(const Region& r, const char* p, bool write, std::uint32_t other, bool other_wrote, bool same_block, void* at) {
    std::string where = (r.index >= 0 ? "" : "shared memory, ") + std::string(r.name) + ", byte " + std::to_string(p - r.begin);
    std::string them = other == SEVERAL ? "other threads" : same_block ? name_of(other - 1) : "a thread of another block";
    stop_here("race on " + where + ": " + name_of(who - 1) + " of " + block_name() + (write ? " writes" : " reads") + " what " + them +
              (other_wrote ? " wrote" : " read") + (same_block ? ", with no barrier between" : ""), at);
}
void access(void* address, std::size_t size, bool write, void* at) {
    char* p = static_cast<char*>(address);
    if (!checked || (p >= current->stack.get() && p < current->stack.get() + STACK)) return;
    const Region* found = nullptr;
    if (recent < regions.size() && p >= regions[recent].begin && p < regions[recent].end) found = &regions[recent];
    else
        for (std::size_t i = 0; i < regions.size(); ++i)
            if (p >= regions[i].begin && p < regions[i].end) { found = &regions[i]; recent = i; break; }
    if (!found || p + size > found->end || (write && !found->writable)) {
        std::string what = name_of(who - 1) + " of " + block_name() + (write ? " writes " : " reads ") + std::to_string(size) + " bytes ";
        if (found && !(write && !found->writable)) stop_here("outside " + std::string(found->name) + ": " + what + "that begin in it and end behind it", at);
        if (found) stop_here("outside what may be written: " + what + "of a constant", at);
        const Region* near = nullptr;       // the argument whose end or begin is closest
        auto distance = [&](const Region& r) { return p < r.begin ? r.begin - p : p - r.end + 1; };
        for (const Region& r : regions)
            if (r.index >= 0 && (!near || distance(r) < distance(*near))) near = &r;
        if (near && distance(*near) < (1 << 20))
            stop_here("outside " + std::string(near->name) + ": " + what + (p < near->begin ? std::to_string(near->begin - p) + " bytes before its begin"
                      : std::to_string(p - near->end) + " bytes behind its end"), at);
        stop_here("outside all memory: " + what + "at an address that belongs to no argument", at);
    }
    if (!found->bytes) return;
    if (reinterpret_cast<std::uintptr_t>(p) % size) stop_here("misaligned: " + name_of(who - 1) + " of " + block_name() + (write ? " writes " : " reads ") + std::to_string(size) + " bytes at an address that is no multiple of " + std::to_string(size), at);
    for (std::size_t i = 0; i < size; ++i) {
        Byte& b = found->bytes[p + i - found->begin];
        bool shared = found->index < 0;
        auto clash = [&](std::uint32_t other, std::uint32_t when) {
            if (!when || (shared && when < block_began)) return false;
            return (other != who && when == now) || when < block_began;
        };
        if (!in_atomic) {
            if (clash(b.writer, b.written)) conflict(*found, p + i, write, b.writer, true, b.written >= block_began, at);
            if (write && clash(b.reader, b.read)) conflict(*found, p + i, write, b.reader, false, b.read >= block_began, at);
            if (write) { b.writer = who; b.written = now; }
            else if (b.read == now && b.reader != who) b.reader = SEVERAL;
            else { b.reader = who; b.read = now; }
        }
    }
}
struct Segments { const void* inside; std::vector<Region>* regions; std::uintptr_t base; };
int segment(dl_phdr_info* info, std::size_t, void* data) {
    auto* s = static_cast<Segments*>(data);
    auto at = reinterpret_cast<std::uintptr_t>(s->inside);
    bool ours = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        auto& h = info->dlpi_phdr[i];
        ours = ours || (h.p_type == PT_LOAD && at >= info->dlpi_addr + h.p_vaddr && at < info->dlpi_addr + h.p_vaddr + h.p_memsz);
    }
    if (!ours) return 0;
    s->base = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        auto& h = info->dlpi_phdr[i];
        if (h.p_type != PT_LOAD) continue;
        char* begin = reinterpret_cast<char*>(info->dlpi_addr + h.p_vaddr);
        if (!(h.p_flags & PF_W)) s->regions->push_back({begin, begin + h.p_memsz, nullptr, "a constant", -1, false});
    }
    return 1;
}
}  // namespace

void barrier(int line) { wait(AT_BARRIER, line); }
int lane() { return static_cast<int>(current->number % 32); }
void atomic(bool begins) { in_atomic = begins; }
void stop(const char* why) { stop_here(why, nullptr); }
std::uint64_t exchange(unsigned mask, std::uint64_t bits, int from, int line) {
    current->mask = mask;
    current->bits = bits;
    current->from = from;
    wait(AT_SHUFFLE, line);
    return current->bits;
}

// Runs every block. statics: offset and size in the library of each of its variables. 0: good. 1: `report` says what happened, `offset` where in the library (0: unknown).
extern "C" int emulator_run(void (*kernel)(const Value*), const unsigned* grid, const unsigned* threads, const Value* arguments,
                            const std::int64_t* bytes, const char* const* names, int n, const std::int64_t* statics,
                            const char* const* static_names, int n_statics, int ordering, int check, char* text,
                            std::size_t text_size, std::uint64_t* offset) {
    grid_size = dim3(grid[0], grid[1], grid[2]);
    block_size = dim3(threads[0], threads[1], threads[2]);
    values = arguments;
    entry = kernel;
    failed = in_atomic = false;
    checked = check;
    report = text;
    report_size = text_size;
    place = nullptr;
    now = 0;
    recent = 0;
    regions.clear();
    for (int i = 0; i < n; ++i)
        if (bytes[i] >= 0 && check) {
            char* p = static_cast<char*>(arguments[i].pointer);
            regions.push_back({p, p + bytes[i], static_cast<Byte*>(std::calloc(bytes[i] + 1, sizeof(Byte))), names[i], i, true});
        }
    Segments s{reinterpret_cast<const void*>(kernel), &regions, 0};
    dl_iterate_phdr(segment, &s);
    for (int i = 0; i < n_statics; ++i) {   // the library's own variables: the kernel's shared memory
        char* p = reinterpret_cast<char*>(s.base + statics[2 * i]);
        regions.push_back({p, p + statics[2 * i + 1], static_cast<Byte*>(std::calloc(statics[2 * i + 1], sizeof(Byte))), static_names[i], -1, true});
    }
    for (dim3* d : {&thread, &block, &block_size, &grid_size})
        regions.push_back({reinterpret_cast<char*>(d), reinterpret_cast<char*>(d + 1), nullptr, "threadIdx, blockIdx, blockDim and gridDim", -1, false});
    if (n) regions.push_back({(char*)arguments, (char*)(arguments + n), nullptr, "the arguments", -1, false});
    std::mt19937 random(ordering);
    std::uint64_t blocks = std::uint64_t(grid[0]) * grid[1] * grid[2];
    std::vector<std::uint32_t> turn(blocks);
    std::iota(turn.begin(), turn.end(), 0);
    if (ordering == 1) std::reverse(turn.begin(), turn.end());
    if (ordering > 1) std::shuffle(turn.begin(), turn.end(), random);
    for (std::uint32_t b : turn) {
        if (failed) break;
        block = dim3(b % grid[0], b / grid[0] % grid[1], b / (grid[0] * grid[1]));
        run_block(random, ordering);
    }
    for (Region& r : regions) std::free(r.bytes);
    *offset = place ? reinterpret_cast<std::uintptr_t>(place) - s.base : 0;
    return failed;
}
}  // namespace emulator

// The compiler puts a call of these before every access of the kernel.
#define HERE __builtin_return_address(0)
#define SIZES(n) \
    extern "C" void __tsan_read##n(void* p) { emulator::access(p, n, false, HERE); } \
    extern "C" void __tsan_write##n(void* p) { emulator::access(p, n, true, HERE); } \
    extern "C" void __tsan_unaligned_read##n(void* p) { emulator::access(p, n, false, HERE); } \
    extern "C" void __tsan_unaligned_write##n(void* p) { emulator::access(p, n, true, HERE); }
SIZES(1) SIZES(2) SIZES(4) SIZES(8) SIZES(16)
extern "C" void __tsan_read_range(void* p, std::size_t n) { for (std::size_t i = 0; i < n; ++i) emulator::access(static_cast<char*>(p) + i, 1, false, HERE); }
extern "C" void __tsan_write_range(void* p, std::size_t n) { for (std::size_t i = 0; i < n; ++i) emulator::access(static_cast<char*>(p) + i, 1, true, HERE); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
