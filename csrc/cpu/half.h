/* Scales as float16 stores them. */
#ifndef QCORE_HALF_H
#define QCORE_HALF_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* x rounded to what float16 stores, never to zero; infinite beyond its range. */
static float round_half(float x) {
    const float tiny = 0x1p-24f, size = fabsf(x);
    float stored = INFINITY;
    if (size < tiny)
        stored = tiny;
    else if (size < 0x1p-14f)
        stored = (size + 0.5f) - 0.5f; /* the step of float32 between 0.5 and 1 is 2^-24 */
    else if (size < 65520.0f) {
        uint32_t u;
        memcpy(&u, &size, 4);
        u = (u + 0xfffu + ((u >> 13) & 1u)) & ~0x1fffu;
        memcpy(&stored, &u, 4);
    }
    return x < 0 ? -stored : stored;
}

#endif
