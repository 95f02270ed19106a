/* Decoder layers with registers of 4 floats, as every machine has them; of NEON by its own products. */
#include "layer.h"

HOLD_TEXT

#define TARGET
#define LANES 4
#if defined(__aarch64__)
#define MULTIPLY_ADD(x, y, z) (V)vfmaq_n_f32((float32x4_t)(z), (float32x4_t)(x), y)
#define MULTIPLY_ADD_ALL(x, y, z) (V)vfmaq_f32((float32x4_t)(z), (float32x4_t)(x), (float32x4_t)(y))
#else
#define MULTIPLY_ADD(x, y, z) ((x) * (y) + (z))
#define MULTIPLY_ADD_ALL(x, y, z) ((x) * (y) + (z))
#endif
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#include "layer_step.h"

const Layers plain_layers = {layers, dense};
