// What the fuzz drivers share: random numbers, buffers of exact size, failures, the main loop.
//
//     PROGRAM SEED CASES [SHORT]
//
// Every buffer is malloc'd at exactly its documented size: one element too many is a report.
// SHORT names a buffer that gets one element less, a proof that this would be seen; or is "race",
// and two threads call with the same results.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "fastsd_native.h"

static std::mt19937_64 generator;
static std::string short_one;
static int64_t below(int64_t n) { return (int64_t)(generator() % (uint64_t)n); }
static bool flip() { return below(2); }
static float real() { return (float)(below(2000001) - 1000000) * 1e-6f; }  // in [-1, 1]

template <class T> struct Exact {
    T* data = nullptr;
    int64_t count;
    size_t bytes;
    Exact(const char* name, int64_t n, size_t alignment = sizeof(void*))
        : count(n), bytes((size_t)n * sizeof(T)) {
        if (short_one == name && n) bytes -= sizeof(T);
        if (posix_memalign((void**)&data, alignment, bytes)) abort();
        memset(data, 0xff, bytes);  // not a number
    }
    Exact(const Exact&) = delete;
    ~Exact() { free(data); }
};

static int failures = 0;
static void expect(bool holds, const char* what, const std::string& where) {
    if (holds) return;
    printf("%s: %s\n", what, where.c_str());
    failures++;
}

// Numbers of the problem's dtype.
static int64_t size_of(int dtype) { return dtype == FASTSD_BF16 ? 2 : 4; }
static void put(uint8_t* at, int dtype, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (dtype == FASTSD_F32) memcpy(at, &bits, 4);
    else at[0] = (uint8_t)(bits >> 16), at[1] = (uint8_t)(bits >> 24);
}
static float get(const uint8_t* at, int dtype) {
    uint32_t bits = 0;
    if (dtype == FASTSD_F32) memcpy(&bits, at, 4);
    else bits = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 24;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// rows x columns with a row stride; the last row has no padding behind it.
struct Matrix {
    int dtype;
    int64_t rows, columns, stride;
    Exact<uint8_t> bytes;
    Matrix(const char* name, int type, int64_t r, int64_t c, int64_t extra = 0)
        : dtype(type), rows(r), columns(c), stride(c + extra),
          bytes(name, r ? ((r - 1) * (c + extra) + c) * size_of(type) : 0) {}
    uint8_t* at(int64_t i, int64_t j) const {
        return bytes.data + (i * stride + j) * size_of(dtype);
    }
    void fill(float scale) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++)
                if (at(i, j) + size_of(dtype) <= bytes.data + bytes.bytes)  // not if SHORT
                    put(at(i, j), dtype, scale * real());
    }
    bool finite() const {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < columns; j++)
                if (!std::isfinite(get(at(i, j), dtype))) return false;
        return true;
    }
};

template <class Case>
static int fuzz(int count, char** words, Case one) {
    if (count < 3) return fprintf(stderr, "%s SEED CASES [SHORT]\n", words[0]), 2;
    if (!*fastsd_isa()) return fprintf(stderr, "no such instruction set here\n"), 2;
    generator.seed((uint64_t)atoll(words[1]));
    if (count > 3) short_one = words[3];
    int64_t cases = atoll(words[2]);
    for (int64_t i = 0; i < cases; i++) one();
    printf("%lld cases with %s, %d failures\n", (long long)cases, fastsd_isa(), failures);
    return failures ? 1 : 0;
}
