/* Decoder layers with registers of 8 floats: AVX2. */
#include "layer.h"

HOLD_TEXT

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define MULTIPLY_ADD(x, y, z) (V)_mm256_fmadd_ps((__m256)(x), _mm256_set1_ps(y), (__m256)(z))
#define MULTIPLY_ADD_ALL(x, y, z) (V)_mm256_fmadd_ps((__m256)(x), (__m256)(y), (__m256)(z))
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#include "layer_step.h"

const Layers avx2_layers = {layers, dense};
#endif
