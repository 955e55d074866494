// The machine behind emulator.h: fibres, their order, and what is checked at each access to memory.
//
//   outside      an access that is in no argument, not in shared memory, not on the thread's own stack
//   unwritten    shared memory is read that no thread of the block has written
//   race         two threads of a block touch a byte between the same two barriers, or two blocks touch it at all,
//                and one of them writes (atomics among themselves may)
//   divergence   threads of a block wait at different barriers, or some have left; the same for shuffles of a warp
//   endless      one thread runs for SECONDS, or a block comes to ROUNDS barriers
//
// A launch runs in a child process, on memory that it shares with the parent, and ends at the first error. So
// nothing has to be unwound, and a kernel that crashes all the same is an error like the others.
//
// A fibre that finishes its thread goes on with the next thread itself: a kernel without barriers never switches.

#include "emulator.h"
#include <algorithm>
#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <dlfcn.h>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

namespace emulator {
Place here;

namespace {
constexpr std::size_t STACK = 64 << 10, PAGE = 4 << 10;
constexpr std::size_t GAP = 64 << 20;           // between two arguments, so that running over the end of one is noticed
constexpr int SECONDS = 2, ROUNDS = 100'000;

// What the child tells its parent. A place is an instruction, counted from the library's begin; 0: not known.
struct Report { char text[1000]; std::uint64_t place, other_place, last_place; };
Report* report;

enum State { FREE, RUNNING, AT_BARRIER, AT_SHUFFLE };
struct Fibre {
    ucontext_t context;                         // to begin with; afterwards `jump`, which needs no call of the system
    std::jmp_buf jump;
    char* stack;
    bool begun = false;
    State state = FREE;
    unsigned number = 0;                        // of its thread in the block
    int line = 0, place = 0;
    unsigned mask = 0;                          // of a shuffle
    int from = 0;
    bool orders_memory = false;
    std::uint64_t bits = 0;
};
std::vector<std::unique_ptr<Fibre>> fibres;
Fibre* current;
std::jmp_buf scheduler;

std::vector<unsigned> order;                    // of the threads
std::size_t next_thread;
std::vector<Fibre*> fibre_of;                   // by thread, once it runs
std::vector<bool> finished;
void (*kernel)(const Value*);
const Value* values;
char* library;                                  // its begin in memory
volatile std::uint64_t turns;                   // how often another thread has taken over

// What is remembered of a byte: who wrote it and who read it last, when, and where. 0: nobody.
// Who: 1 + the thread, with ATOMIC or not; of readers also WARP + the warp if several of it, else SEVERAL.
struct Byte { std::uint32_t writer, written, reader, read, write_place, read_place; };
constexpr std::uint32_t ATOMIC = 1u << 31, SEVERAL = 1u << 30, WARP = 1u << 29;
struct Region { char *begin, *end; Byte* bytes; std::string name; bool argument, shared; std::int64_t element_size; };
std::vector<Region> regions;
std::size_t recent;
// Time goes on at each barrier.
std::uint32_t now, block_began, barrier_passed, who;
std::vector<std::uint32_t> warp_barrier_passed;
bool in_atomic;
char *watched;                                  // the last write to this byte is `watched_place`
std::uint32_t watched_place;

unsigned count() { return here.block_size.x * here.block_size.y * here.block_size.z; }
std::string three(dim3 at, dim3 size) {
    std::string s = std::to_string(at.x);
    if (size.y * size.z > 1) s += "," + std::to_string(at.y) + "," + std::to_string(at.z);
    return s;
}
dim3 thread_at(unsigned t) {
    dim3 size = here.block_size;
    return size.y * size.z == 1 ? dim3(t, 0, 0) : dim3(t % size.x, t / size.x % size.y, t / (size.x * size.y));
}
std::string name_of(unsigned t) { return "thread " + three(thread_at(t), here.block_size); }
std::string block_name() { return "block " + three(here.block, here.grid_size); }
std::string me() { return name_of(current->number) + " of " + block_name(); }

[[noreturn]] void stop(const std::string& why, std::uint32_t place = 0, std::uint32_t other_place = 0) {
    std::snprintf(report->text, sizeof report->text, "%s", why.c_str());
    report->place = place;
    report->other_place = other_place;
    std::fflush(stdout);
    _exit(1);
}

// ---- fibres ----

void take_place(Fibre* f) {
    current = f;
    who = 1 + f->number;
    here.thread = thread_at(f->number);
    turns = turns + 1;
}
void leave(State state) {                       // for the scheduler, who may come back
    current->state = state;
    if (!_setjmp(current->jump)) _longjmp(scheduler, 1);
}
void resume(Fibre* f) {
    f->state = RUNNING;
    take_place(f);
    if (_setjmp(scheduler)) return;
    if (f->begun) _longjmp(f->jump, 1);
    f->begun = true;
    setcontext(&f->context);
}
void body() {
    for (;;) {
        while (next_thread < order.size()) {
            current->number = order[next_thread++];
            fibre_of[current->number] = current;
            take_place(current);
            kernel(values);
            finished[current->number] = true;
        }
        leave(FREE);
    }
}
Fibre* fibre(std::size_t i) {
    if (i < fibres.size()) return fibres[i].get();
    fibres.push_back(std::make_unique<Fibre>());
    Fibre* f = fibres.back().get();
    char* memory = static_cast<char*>(mmap(nullptr, PAGE + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED) stop("there is no memory for the stacks of the threads");
    mprotect(memory, PAGE, PROT_NONE);          // a stack that is too small runs into this, and not into another one
    f->stack = memory + PAGE;
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, body, 0);
    return f;
}

// ---- barriers and shuffles ----

// Exchanges where all lanes that a mask names have arrived. True if there was one.
bool shuffles() {
    bool any = false;
    for (unsigned first = 0; first < count(); first += 32) {
        unsigned lanes = std::min(32u, count() - first), waiting = 0;
        for (unsigned l = 0; l < lanes; ++l)
            if (!finished[first + l] && fibre_of[first + l]->state == AT_SHUFFLE) waiting |= 1u << l;
        for (unsigned l = 0; l < lanes; ++l) {
            if (!(waiting >> l & 1)) continue;
            Fibre* f = fibre_of[first + l];
            unsigned wanted = lanes == 32 ? f->mask : f->mask & ((1u << lanes) - 1);
            if (!(wanted >> l & 1)) { current = f; stop(me() + " is not in the mask of its own shuffle in line " + std::to_string(f->line)); }
            bool together = (wanted & ~waiting) == 0;
            for (unsigned o = 0; o < lanes && together; ++o)
                if (wanted >> o & 1) together = fibre_of[first + o]->line == f->line && fibre_of[first + o]->mask == f->mask;
            if (!together) continue;
            std::uint64_t bits[32];
            for (unsigned o = 0; o < lanes; ++o) bits[o] = fibre_of[first + o]->bits;
            for (unsigned o = 0; o < lanes; ++o) {
                if (!(wanted >> o & 1)) continue;
                Fibre* g = fibre_of[first + o];
                if (g->from >= 0 && g->from < 32) {         // beyond the warp a lane gets its own value
                    if (!(wanted >> g->from & 1)) {
                        current = g;
                        stop("divergence in line " + std::to_string(g->line) + ": " + me() + " shuffles with lane " + std::to_string(g->from) + ", which is not in the mask or does not exist");
                    }
                    g->bits = bits[g->from];
                }
                g->state = RUNNING;
            }
            waiting &= ~wanted;
            if (f->orders_memory && wanted == (lanes == 32 ? ~0u : (1u << lanes) - 1)) warp_barrier_passed[first / 32] = ++now;
            any = true;
        }
    }
    return any;
}
[[noreturn]] void diverged(const std::vector<Fibre*>& waiting) {
    const Fibre* a = waiting[0];
    std::string what = a->state == AT_BARRIER ? " waits at the barrier" : " waits at the warp shuffle";
    std::string start = "divergence in line " + std::to_string(a->line) + ": " + name_of(a->number) + " of " + block_name() + what + ", ";
    for (unsigned t = 0; t < count(); ++t)
        if (finished[t] && (a->state == AT_BARRIER || t / 32 == a->number / 32)) stop(start + name_of(t) + " has left the kernel");
    for (const Fibre* f : waiting)
        if (f->state != a->state || f->place != a->place)
            stop(start + name_of(f->number) + (f->state == AT_BARRIER ? " at the barrier" : " at the warp shuffle") + " of line " + std::to_string(f->line));
    stop(start + "and the threads that its mask names do not come together");
}
void run_block(std::mt19937& random, int ordering) {
    order.resize(count());
    std::iota(order.begin(), order.end(), 0);
    if (ordering == 1) std::reverse(order.begin(), order.end());
    if (ordering > 1) std::shuffle(order.begin(), order.end(), random);
    next_thread = 0;
    finished.assign(count(), false);
    fibre_of.assign(count(), nullptr);
    block_began = barrier_passed = ++now;
    warp_barrier_passed.assign((count() + 31) / 32, now);
    for (std::size_t used = 0; next_thread < order.size();) resume(fibre(used++));     // each takes threads until one waits
    std::vector<Fibre*> waiting;
    for (int round = 0;; ++round) {
        waiting.clear();
        for (unsigned t : order)
            if (!finished[t]) waiting.push_back(fibre_of[t]);
        if (waiting.empty()) return;
        if (round == ROUNDS) stop("endless, line " + std::to_string(waiting[0]->line) + ": " + block_name() + " has come to " + std::to_string(ROUNDS) + " barriers and shuffles");
        if (ordering > 1) std::shuffle(waiting.begin(), waiting.end(), random);
        if (!shuffles()) {
            bool all = waiting.size() == count();
            for (Fibre* f : waiting) all = all && f->state == AT_BARRIER && f->place == waiting[0]->place;
            if (!all) diverged(waiting);
            for (Fibre* f : waiting) f->state = RUNNING;
            barrier_passed = ++now;
        }
        for (Fibre* f : waiting)
            if (f->state == RUNNING) resume(f);
    }
}

// ---- memory ----

std::uint32_t warp_of(std::uint32_t one) { return one & SEVERAL ? ~0u : one & WARP ? one & ~WARP : ((one & ~ATOMIC) - 1) / 32; }

// Whether what `other` did at the time `when` is neither before nor after what this thread does now.
bool clash(const Region& r, std::uint32_t other, std::uint32_t when) {
    if (!other || (in_atomic && other & ATOMIC)) return false;
    if (when < block_began) return !r.shared;               // another block, which had its own shared memory
    if ((other & ~ATOMIC) == who) return false;
    std::uint32_t warp = (who - 1) / 32;
    return when >= (warp_of(other) == warp ? std::max(barrier_passed, warp_barrier_passed[warp]) : barrier_passed);
}
[[noreturn]] void race(const std::string& place, bool write, const Byte& b, bool other_wrote, std::uint32_t at) {
    std::uint32_t other = other_wrote ? b.writer : b.reader, when = other_wrote ? b.written : b.read;
    bool same_block = when >= block_began, one = !(other & (WARP | SEVERAL));
    std::string them = !same_block ? "another block" : one ? name_of((other & ~ATOMIC) - 1) : "other threads";
    stop("race on " + place + ": " + me() + (write ? " writes" : " reads") + " what " + them + (other_wrote ? " wrote" : " read") +
             (same_block ? ", with no barrier between" : ""), at, other_wrote ? b.write_place : b.read_place);
}
[[noreturn]] void outside(char* p, std::size_t size, bool write, std::uint32_t at) {
    std::string what = me() + (write ? " writes " : " reads ") + std::to_string(size) + (size == 1 ? " byte " : " bytes ");
    const Region* near = nullptr;               // the argument or variable whose end or begin is closest
    auto distance = [&](const Region& r) { return p < r.begin ? r.begin - p : p - r.end; };
    for (const Region& r : regions)
        if (!near || distance(r) < distance(*near)) near = &r;
    if (!near || distance(*near) > static_cast<std::ptrdiff_t>(GAP / 2)) stop("outside all memory: " + what + "at an address that belongs to no argument", at);
    if (p < near->begin) stop("outside " + near->name + ": " + what + std::to_string(near->begin - p) + " bytes before it begins", at);
    if (p < near->end) stop("outside " + near->name + ": " + what + "that begin in it and end behind it", at);
    stop("outside " + near->name + ": " + what + (p == near->end ? "just behind its end" : std::to_string(p - near->end) + " bytes behind its end"), at);
}
void access(void* address, std::size_t size, bool write, bool aligned, void* returns_to) {
    char* p = static_cast<char*>(address);
    auto at = static_cast<std::uint32_t>(static_cast<char*>(returns_to) - library);
    report->last_place = at;
    auto in = [p](const void* begin, std::size_t bytes) { return static_cast<std::size_t>(p - static_cast<const char*>(begin)) < bytes; };
    if (in(current->stack, STACK)) return;
    if (in(&here, sizeof here)) {
        if (write) stop(me() + " writes to threadIdx, blockIdx, blockDim or gridDim", at);
        return;
    }
    Region* r = nullptr;
    if (recent < regions.size() && p >= regions[recent].begin && p < regions[recent].end) r = &regions[recent];
    else
        for (std::size_t i = 0; i < regions.size() && !r; ++i)
            if (p >= regions[i].begin && p < regions[i].end) { r = &regions[i]; recent = i; }
    if (!r || p + size > r->end) {
        Dl_info found;
        if (!write && dladdr(p, &found) && found.dli_fbase == library) return;     // a constant
        outside(p, size, write, at);
    }
    if (aligned && reinterpret_cast<std::uintptr_t>(p) % size)
        stop("misaligned: " + me() + (write ? " writes " : " reads ") + std::to_string(size) + " bytes at an address that is no multiple of " + std::to_string(size), at);
    Byte* b = r->bytes + (p - r->begin);
    auto place = [&] { return r->name + ", element " + std::to_string((p - r->begin) / (r->element_size ? r->element_size : static_cast<std::int64_t>(size))); };
    for (std::size_t i = 0; i < size; ++i, ++b) {
        if (clash(*r, b->writer, b->written)) race(place(), write, *b, true, at);
        if (write) {
            if (clash(*r, b->reader, b->read)) race(place(), write, *b, false, at);
            b->writer = in_atomic ? who | ATOMIC : who;
            b->written = now;
            b->write_place = at;
        } else {
            if (r->shared && b->written < block_began) stop("unwritten: " + me() + " reads " + place() + ", which no thread of the block has written yet (a barrier too few?)", at);
            if (in_atomic) continue;            // the write that follows will tell
            std::uint32_t warp = (who - 1) / 32;
            bool own_warp = warp_of(b->reader) == warp;          // what it read before a barrier of its own is settled
            if (b->reader == who || b->read < barrier_passed || (own_warp && b->read < warp_barrier_passed[warp])) b->reader = who;
            else b->reader = own_warp ? WARP | warp : SEVERAL;
            b->read = now;
            b->read_place = at;
        }
    }
    if (write && watched >= p && watched < p + size) watched_place = at;
}
void still_running(int) {                       // every SECONDS of computing
    static std::uint64_t before = ~0ull;
    if (turns == before) {
        std::snprintf(report->text, sizeof report->text, "endless: thread %u,%u,%u of block %u,%u,%u runs for %d seconds and comes to no end",
                      here.thread.x, here.thread.y, here.thread.z, here.block.x, here.block.y, here.block.z, SECONDS);
        report->place = report->last_place;
        _exit(1);
    }
    before = turns;
}
void run_grid(int ordering) {
    std::mt19937 random(ordering);
    dim3 grid = here.grid_size;
    std::vector<std::uint32_t> turn(std::size_t(grid.x) * grid.y * grid.z);
    std::iota(turn.begin(), turn.end(), 0);
    if (ordering == 1) std::reverse(turn.begin(), turn.end());
    if (ordering > 1) std::shuffle(turn.begin(), turn.end(), random);
    for (std::uint32_t b : turn) {
        here.block = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
        run_block(random, ordering);
    }
}
volatile pid_t child;
volatile std::sig_atomic_t interrupted;
void interrupt(int) {                           // Ctrl-C, in the parent
    interrupted = 1;
    kill(child, SIGKILL);
}
Byte* remembered(std::size_t bytes) {
    void* memory = mmap(nullptr, bytes * sizeof(Byte) + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) stop("there is no memory to remember every access in");
    madvise(memory, bytes * sizeof(Byte), MADV_HUGEPAGE);
    return static_cast<Byte*>(memory);
}
}  // namespace

void barrier(int line, int place) {
    current->line = line;
    current->place = place;
    leave(AT_BARRIER);
}
int lane() { return static_cast<int>(current->number % 32); }
void atomic(bool begins) { in_atomic = begins; }
std::uint64_t exchange(unsigned mask, std::uint64_t bits, int from, bool orders_memory, int line) {
    Fibre* self = current;
    self->mask = mask;
    self->bits = bits;
    self->from = from;
    self->orders_memory = orders_memory;
    self->line = self->place = line;
    leave(AT_SHUFFLE);
    return self->bits;
}

struct Variable { std::int64_t offset, bytes; const char* name; bool shared; };    // of the library that holds the kernel

// Runs every block. `bytes` of each argument that is a pointer, -1 of the others. 0: good, and what the pointers point
// at is changed. 1: an error, and nothing is changed; `text`, and its `places`, say what and where.
// watch: argument and byte whose last write `places` shall tell, or -1.
extern "C" int emulator_run(void (*entry)(const Value*), const unsigned* grid, const unsigned* threads, Value* arguments,
                            const std::int64_t* bytes, int n, const Variable* variables, int n_variables, int ordering,
                            const std::int64_t* watch, char* text, std::size_t text_size, std::uint64_t* places) {
    here = {dim3(0, 0, 0), dim3(0, 0, 0), dim3(threads[0], threads[1], threads[2]), dim3(grid[0], grid[1], grid[2])};
    std::size_t room = PAGE;
    auto whole = [](std::size_t size) { return (size + PAGE - 1) / PAGE * PAGE + GAP; };
    for (int i = 0; i < n; ++i)
        if (bytes[i] >= 0) room += whole(bytes[i]);
    char* area = static_cast<char*>(mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (area == MAP_FAILED) { std::snprintf(text, text_size, "there is no memory for the arguments"); return 1; }
    report = reinterpret_cast<Report*>(area);

    std::vector<Value> given(arguments, arguments + n), inside(given);
    char* next = area + PAGE;
    for (int i = 0; i < n; ++i) {
        if (bytes[i] < 0) continue;
        std::memcpy(next, given[i].pointer, bytes[i]);
        inside[i].pointer = next;
        next += whole(bytes[i]);
    }
    std::fflush(stdout);
    interrupted = 0;
    child = fork();
    if (child == 0) {
        for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGINT}) std::signal(s, SIG_DFL);
        std::signal(SIGVTALRM, still_running);
        itimerval every{{SECONDS, 0}, {SECONDS, 0}};
        setitimer(ITIMER_VIRTUAL, &every, nullptr);
        kernel = entry;
        values = inside.data();
        Dl_info found;
        dladdr(reinterpret_cast<void*>(entry), &found);
        library = static_cast<char*>(found.dli_fbase);
        for (int i = 0; i < n; ++i)
            if (bytes[i] >= 0) {
                char* p = static_cast<char*>(inside[i].pointer);
                regions.push_back({p, p + bytes[i], remembered(bytes[i]), "argument " + std::to_string(i), true, false, inside[i].element_size});
            }
        for (int i = 0; i < n_variables; ++i) {
            const Variable& v = variables[i];
            char* p = library + v.offset;
            regions.push_back({p, p + v.bytes, remembered(v.bytes), (v.shared ? "the shared memory " : "the variable ") + std::string(v.name), false, v.shared, 0});
        }
        if (watch[0] >= 0) watched = static_cast<char*>(inside[watch[0]].pointer) + watch[1];
        run_grid(ordering);
        report->place = watched_place;
        std::fflush(stdout);
        _exit(0);
    }
    struct sigaction ours{}, before;
    ours.sa_handler = interrupt;
    int status = 0;
    pid_t ended = -1;
    if (child > 0) {
        sigaction(SIGINT, &ours, &before);
        do ended = waitpid(child, &status, 0);
        while (ended < 0 && errno == EINTR);
        sigaction(SIGINT, &before, nullptr);
    }
    bool good = ended > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0;
    places[0] = report->place;
    places[1] = report->other_place;
    if (good) {
        for (int i = 0; i < n; ++i)
            if (bytes[i] >= 0) std::memcpy(given[i].pointer, inside[i].pointer, bytes[i]);
    } else if (ended < 0) {
        std::snprintf(text, text_size, "no process can be started to run it in");
    } else if (WIFSIGNALED(status)) {
        places[0] = report->last_place;
        std::snprintf(text, text_size, "the kernel crashed behind this access (%s)", strsignal(WTERMSIG(status)));
    } else {
        std::snprintf(text, text_size, "%s", report->text[0] ? report->text : "the kernel ended its process");
    }
    munmap(area, room);
    if (interrupted) raise(SIGINT);
    return !good;
}
}  // namespace emulator

// The compiler puts a call of these before every access of the kernel.
#define HERE __builtin_return_address(0)
#define SIZES(n) \
    extern "C" void __tsan_read##n(void* p) { emulator::access(p, n, false, true, HERE); } \
    extern "C" void __tsan_write##n(void* p) { emulator::access(p, n, true, true, HERE); } \
    extern "C" void __tsan_unaligned_read##n(void* p) { emulator::access(p, n, false, false, HERE); } \
    extern "C" void __tsan_unaligned_write##n(void* p) { emulator::access(p, n, true, false, HERE); }
SIZES(1) SIZES(2) SIZES(4) SIZES(8) SIZES(16)
extern "C" void __tsan_read_range(void* p, std::size_t n) { emulator::access(p, n, false, false, HERE); }
extern "C" void __tsan_write_range(void* p, std::size_t n) { emulator::access(p, n, true, false, HERE); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
