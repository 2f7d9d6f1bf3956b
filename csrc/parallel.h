// Threads and memory: OpenMP as many threads as the caller says, 64-byte aligned buffers.
// Built with FASTSD_STD_THREADS it uses std::thread, which ThreadSanitizer understands (libgomp's
// own synchronisation it does not).
#pragma once
#include <cstdint>
#include <cstdlib>
#if defined(FASTSD_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace FASTSD_ISA {

// body(thread) for thread = 0 .. threads - 1, side by side.
template <class Body>
inline void parallel(int threads, const Body& body) {
    if (threads == 1) return body(0);
#if defined(FASTSD_STD_THREADS)
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back([&body, i] { body(i); });
    body(0);
    for (auto& other : others) other.join();
#else
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++) body(i);
#endif
}

// The share [first, last) of thread i, in whole pieces.
struct Share {
    int64_t first, last;
    Share(int64_t count, int i, int threads)
        : first(count * i / threads), last(count * (i + 1) / threads) {}
};

// Memory that is not there raises no exception: `ok` is false and the call returns 1.
template <class T>
struct Buffer {
    T* data = nullptr;
    int64_t count;
    explicit Buffer(int64_t n) : count(n) {
        size_t bytes = ((size_t)n * sizeof(T) + 64) / 64 * 64;
        data = (T*)aligned_alloc(64, bytes);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free(data); }
    bool ok() const { return data != nullptr; }
    T* operator+(int64_t i) const { return data + i; }
};

// A thread's memory that stays from call to call and grows as needed: calls that take microseconds
// must not allocate. Under AddressSanitizer it always has the size asked for.
struct Kept {
    char* data = nullptr;
    int64_t bytes = 0;
    Kept() = default;
    Kept(const Kept&) = delete;
    Kept& operator=(const Kept&) = delete;
    ~Kept() { free(data); }

    // Null where there is no memory.
    template <class T>
    T* room(int64_t count) {
#if defined(__SANITIZE_ADDRESS__)
        bytes = 0;
#endif
        int64_t needed = count * (int64_t)sizeof(T);
        if (!data || needed > bytes) {
            free(data);
            data = (char*)aligned_alloc(64, (size_t)(needed + 64) / 64 * 64);
            bytes = data ? needed : 0;
        }
        return (T*)data;
    }
};

}  // namespace FASTSD_ISA
