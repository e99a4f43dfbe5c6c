/* What the modules of nsnet_kernels share. Samples are interleaved RGB bytes; `stride` is the bytes from row to row. */
#ifndef NSNET_KERNELS_H
#define NSNET_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 8 };
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

/* FAST_VARIANT: attribute of a function that is compiled for processors with AVX2; `has_fast_variant`: whether this
 * processor runs it. The vectors are of this width everywhere; elsewhere the compiler splits them. */
#ifdef __x86_64__
#define FAST_VARIANT __attribute__((target("avx2,fma")))
#define has_fast_variant() (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define FAST_VARIANT
#define has_fast_variant() 0
#endif

enum { PATCH_PX = 32 };

/* Fill `entropy` with the spectral entropies in nats of rows · columns patches. See entropy.c. */
void estimate_entropy(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, int is_power,
                      int is_portable, int is_luma, double *entropy);
void prepare_entropy(void);

/* Resize to `side` x `side` pixels, tightly packed in `result`. Returns 0, or -1 without memory. See resize.c. */
int resize_bicubic(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t height, ptrdiff_t width, ptrdiff_t side,
                   int is_portable, uint8_t *result);

#endif
