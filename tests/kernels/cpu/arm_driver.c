/* Runs the library's functions on what comes by stdin, until that ends: built for ARM, and run by an emulator.
 *
 * A request is eight int64 (function, set of instructions, rows, dtype, inputs, bytes of the weight, of x and of y), then the
 * weight and x; the answer an int64, 0 where all went well, and y. Function 0 lists the sets: y has the name of each that can
 * run, in 32 bytes. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int bitpress_kernel_count(void);
const char *bitpress_kernel_name(int index);
int bitpress_kernel_available(int index);
int bitpress_linear(const void *packed, const void *x, int64_t rows, int64_t dtype, const float *bias, void *y, int inputs,
                    int kernel, int threads);
int bitpress_dequantize(const void *packed, int64_t first, int64_t count, int64_t dtype, void *out, int kernel, int threads);
int bitpress_dense(const void *weight, const float *x, void *y, int64_t rows, int64_t out_features, int64_t in_features,
                   int64_t dtype, int kernel, int threads);

static char *get(int64_t bytes) {
    char *memory = aligned_alloc(64, (size_t)(bytes + 127) / 64 * 64);
    if (!memory || fread(memory, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(1);
    return memory;
}

int main(void) {
    for (int64_t r[8]; fread(r, sizeof r, 1, stdin) == 1;) {
        const int set = (int)r[1];
        char *weight = get(r[5]), *x = get(r[6]), *y = calloc(1, (size_t)r[7] + 1);
        int64_t status = 0;
        if (r[0] == 0)
            for (int i = 0; i < bitpress_kernel_count(); i++)
                strcpy(y + 32 * i, bitpress_kernel_available(i) ? bitpress_kernel_name(i) : "");
        if (r[0] == 1) status = bitpress_linear(weight, x, r[2], r[3], NULL, y, (int)r[4], set, 1);
        if (r[0] == 2) status = bitpress_dequantize(weight, 0, r[2], r[3], y, set, 1);
        if (r[0] == 3) status = bitpress_dense(weight, (float *)x, y, r[2], r[7] / r[2] / 4, r[6] / r[2] / 4, r[3], set, 1);
        fwrite(&status, 8, 1, stdout);
        fwrite(y, 1, (size_t)r[7], stdout);
        fflush(stdout);
        free(weight), free(x), free(y);
    }
    return 0;
}
