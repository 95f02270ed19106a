/* Decoder layers with registers of 16 floats: AVX512. */
#include "layer.h"

HOLD_TEXT

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define LANES 16
#define MULTIPLY_ADD(x, y, z) (V)_mm512_fmadd_ps((__m512)(x), _mm512_set1_ps(y), (__m512)(z))
#define MULTIPLY_ADD_ALL(x, y, z) (V)_mm512_fmadd_ps((__m512)(x), (__m512)(y), (__m512)(z))
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#include "layer_step.h"

const Layers avx512_layers = {layers, dense};
#endif
