/* csrc/amx.c on machines that have AVX512-VNNI but no AMX: its instructions as loops, as Intel's manual describes them.
 * Stands in the place of amx.c in the libraries that tests build. */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} Config;

static _Thread_local Config config;
static _Thread_local uint8_t tiles[8][16][64];

static void must(int condition) {
    if (!condition) abort(); /* the machine would raise #UD or #GP */
}

static void load_config(const void *from) {
    memcpy(&config, from, sizeof config);
    must(config.palette == 1 && !config.start);
    for (int t = 0; t < 8; t++) must(config.rows[t] >= 1 && config.rows[t] <= 16 && config.bytes_per_row[t] <= 64);
    memset(tiles, 0, sizeof tiles);
}

static void load_tile(int tile, const void *from, int64_t stride) {
    must(config.palette == 1);
    for (int r = 0; r < config.rows[tile]; r++)
        memcpy(tiles[tile][r], (const char *)from + r * stride, config.bytes_per_row[tile]);
}

static void store_tile(int tile, void *to, int64_t stride) {
    must(config.palette == 1);
    for (int r = 0; r < config.rows[tile]; r++)
        memcpy((char *)to + r * stride, tiles[tile][r], config.bytes_per_row[tile]);
}

/* sums [m][n] += a [m][4k] times b [k][n][4], bytes of a signed, those of b signed or not. */
static void add_products(int sums, int a, int b, int is_signed) {
    must(config.rows[a] == config.rows[sums] && config.bytes_per_row[a] == 4 * config.rows[b]);
    must(config.bytes_per_row[b] == config.bytes_per_row[sums]);
    for (int m = 0; m < config.rows[sums]; m++)
        for (int n = 0; n < config.bytes_per_row[sums] / 4; n++) {
            int32_t sum;
            memcpy(&sum, tiles[sums][m] + 4 * n, 4);
            for (int k = 0; k < config.bytes_per_row[a]; k++) {
                const uint8_t code = tiles[b][k / 4][4 * n + k % 4];
                sum += (int8_t)tiles[a][m][k] * (is_signed ? (int8_t)code : code);
            }
            memcpy(tiles[sums][m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#define _tile_loadconfig(from) load_config(from)
#define _tile_release() (config.palette = 0)
#define _tile_zero(tile) memset(tiles[tile], 0, sizeof tiles[tile])
#define _tile_loadd(tile, from, stride) load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) store_tile(tile, to, stride)
#define _tile_dpbssd(sums, a, b) add_products(sums, a, b, 1)
#define _tile_dpbsud(sums, a, b) add_products(sums, a, b, 0)

int has_avx512_vnni(void);
int has_amx_int8(void) { return has_avx512_vnni(); }
#define has_amx_int8 has_amx_int8_of_this_machine
int has_amx_int8_of_this_machine(void);
#include "amx.c"
