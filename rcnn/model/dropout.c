/* Dropout on the CPU: the mask is not stored but drawn again in the backward pass, from a generator without a state.
 *
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a counter and a key to 128 random
 * bits: eight draws of 16 bits. The key and half of the counter name the layer and the step, the rest of the counter is
 * (group of eight elements in the image, image). A draw therefore depends on nothing else: not on threads, nor on their order.
 * Compiled by dropout.py with the macros of element.h.
 */
#include "element.h"

enum {
  COUNTERS = 16,              /* counters at a time: one for each lane of a vector */
  DRAWS = 8 * COUNTERS,       /* elements that they serve */
};

/* 8 x COUNTERS draws of 16 bits, for the counters first, first + 1, ... of an image. */
static inline void draw(uint32_t first, uint32_t image, const uint32_t name[4], uint16_t draws[DRAWS]) {
  uint32_t a[COUNTERS], b[COUNTERS], c[COUNTERS], d[COUNTERS], key_0 = name[2], key_1 = name[3];
  for (uint32_t i = 0; i < COUNTERS; i++) a[i] = first + i, b[i] = image, c[i] = name[0], d[i] = name[1];
  for (int round = 0; round < 10; round++, key_0 += 0x9E3779B9, key_1 += 0xBB67AE85)
    for (int i = 0; i < COUNTERS; i++) {
      uint64_t left = (uint64_t)a[i] * 0xD2511F53, right = (uint64_t)c[i] * 0xCD9E8D57;
      a[i] = (uint32_t)(right >> 32) ^ b[i] ^ key_0;
      b[i] = (uint32_t)right;
      c[i] = (uint32_t)(left >> 32) ^ d[i] ^ key_1;
      d[i] = (uint32_t)left;
    }
  uint32_t *words[] = {a, b, c, d};
  for (int w = 0; w < 4; w++)
    for (int i = 0; i < COUNTERS; i++) {
      draws[2 * w * COUNTERS + i] = (uint16_t)words[w][i];
      draws[(2 * w + 1) * COUNTERS + i] = (uint16_t)(words[w][i] >> 16);
    }
}

/* out = in, with each element zeroed if its draw is below `rate` (in 65536ths), and the others divided by 1 - rate. */
static void drop_image(const element *in, element *out, long elements, uint32_t image, const uint32_t name[4], uint32_t rate) {
  const real scale = (real)65536 / (65536 - rate);
  uint16_t draws[DRAWS];
  for (long at = 0; at < elements; at += DRAWS) {
    long num = elements - at < DRAWS ? elements - at : DRAWS;
    draw(at / 8, image, name, draws);
#pragma GCC ivdep
    for (long i = 0; i < num; i++) out[at + i] = rounded(draws[i] < rate ? 0 : load(in[at + i]) * scale);
  }
}

void dropout(const element *in, element *out, long images, long elements, const uint32_t name[4], uint32_t rate, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (images * elements > SMALL)
  for (long image = 0; image < images; image++)
    drop_image(in + image * elements, out + image * elements, elements, image, name, rate);
}

/* The generator itself, for its test against published values. */
void philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t name[4] = {counter[2], counter[3], key[0], key[1]};
  uint16_t draws[DRAWS];
  draw(counter[0], counter[1], name, draws);
  for (int w = 0; w < 4; w++) out[w] = draws[2 * w * COUNTERS] | (uint32_t)draws[(2 * w + 1) * COUNTERS] << 16;
}
