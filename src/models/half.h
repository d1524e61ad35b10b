// Numbers of float or bfloat16 in memory, float in between.
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float load(const void *x, long i, int half) {
    if (!half) return ((const float *)x)[i];
    union { uint32_t bits; float value; } u = {(uint32_t)((const uint16_t *)x)[i] << 16};
    return u.value;
}

INLINE void store(void *x, long i, float value, int half) {
    if (!half) {
        ((float *)x)[i] = value;
        return;
    }
    union { float value; uint32_t bits; } u = {value};
    uint32_t rounded = u.bits + 0x7fff + ((u.bits >> 16) & 1);  // to nearest, ties to even
    ((uint16_t *)x)[i] = (uint16_t)((value == value ? rounded : u.bits | 0x400000) >> 16);
}
