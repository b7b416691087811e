/* Sum, ReLU and LRN on the CPU, in one pass over memory, forward and backward.
 *
 * Compiled by lrn_cpu.py for one network at a time with these macros, so that the inner loops have constant trip counts:
 *
 *   MAPS       K, feature maps
 *   WINDOW     N, maps in a sum
 *   RECTIFIED  whether there is a ReLU
 *
 * and those of element.h.
 *
 * Tensors are matrices of positions (rows) and MAPS columns. d = 1 + scale * (sum of squares), and the exponent is 3/4.
 */
#include <math.h>
#include <tgmath.h>

#include "element.h"

enum {
  PADDED = MAPS + WINDOW - 1,                /* a row with the zero padding that its outermost sums read */
  ROWS = PADDED < 512 ? 512 / PADDED : 1,    /* rows per block; a block stays in the L1 cache */
  ROOM = ROWS * PADDED + WINDOW + 64,        /* with slack: sums and vector loads read past the last row */
};

/* A block of padded rows, and the sums of each four neighbours in it: overlapping windows share them. */
typedef struct {
  real values[ROOM] __attribute__((aligned(64)));
  real fours[ROOM] __attribute__((aligned(64)));
} block;

static inline real rectified(real z) {
  return RECTIFIED && z < 0 ? 0 : z;
}

/* d^-3/4, for d >= 1. In float by two of Halley's iterations from a guess that divides the exponent's bits: within 1.4e-7,
 * where two square roots and a division are within 2.4e-7 and make the forward pass a fifth slower. */
static inline real decayed(real d) {
  if (sizeof(real) != sizeof(float)) {
    real root = 1 / sqrt(d);
    return root * sqrt(root);
  }
  union { float value; uint32_t bits; } guess = {.value = d}; /* within 4.4 % */
  guess.bits = 0x6F14DD2F - (guess.bits - (guess.bits >> 2));
  real y = guess.value;
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    real dyy = d * (y * y); /* first: d cubed could overflow */
    real error = 1 - dyy * dyy * d;
    y += y * error * ((real)0.25 + (real)0.15625 * error);
  }
  return d >= (real)1e25 ? 0 : y; /* where y * y underflows; y of infinity is 0, and of NaN NaN */
}

static inline void sum_fours(block *b, long rows) {
  if (WINDOW < 4) return;
  const real *restrict v = b->values;
  real *restrict fours = b->fours;
  for (long i = 0; i < rows * PADDED; i++) fours[i] = (v[i] + v[i + 1]) + (v[i + 2] + v[i + 3]);
}

/* The sum of the WINDOW values that start at `at`. */
static inline real window_sum(const real *values, const real *fours, long at) {
  real sum = 0;
#pragma GCC unroll 128
  for (int j = 0; j < WINDOW / 4; j++) sum += fours[at + 4 * j];
#pragma GCC unroll 4
  for (int j = WINDOW / 4 * 4; j < WINDOW; j++) sum += values[at + j];
  return sum;
}

/* The squares of a block's rows, and their sums of four; with `plus`, z becomes z + plus. */
static inline void square(block *b, element *z, const element *plus, long rows) {
  for (long r = 0; r < rows; r++) {
    element *zr = z + r * MAPS;
    const element *restrict plus_r = plus ? plus + r * MAPS : 0;
    real *restrict squares = b->values + r * PADDED + WINDOW / 2;
    if (plus) {
#pragma GCC ivdep
      for (long k = 0; k < MAPS; k++) zr[k] = rounded(load(zr[k]) + load(plus_r[k]));
    }
#pragma GCC ivdep
    for (long k = 0; k < MAPS; k++) squares[k] = rectified(load(zr[k])) * rectified(load(zr[k]));
  }
  sum_fours(b, rows);
}

static inline void forward_block(block *squares, element *z, const element *plus, element *y, long rows, real scale) {
  square(squares, z, plus, rows);
  for (long r = 0; r < rows; r++) {
    const real *restrict v = squares->values + r * PADDED, *restrict fours = squares->fours + r * PADDED;
    const element *restrict zr = z + r * MAPS;
    element *restrict yr = y + r * MAPS;
#pragma GCC ivdep
    for (long k = 0; k < MAPS; k++) {
      yr[k] = rounded(rectified(load(zr[k])) * decayed(1 + scale * window_sum(v, fours, k)));
    }
  }
}

/* dz = [z > 0] (g d^-3/4 - 3/2 scale x band'(g y / d)), where x = relu(z), y = x d^-3/4; band' is the mirrored window. */
static inline void backward_block(block *squares, block *inner, const element *g, const element *z, element *dz, long rows,
                                  real scale) {
  real direct[ROWS * MAPS]; /* g d^-3/4 */
  square(squares, (element *)z, 0, rows);
  for (long r = 0; r < rows; r++) {
    const real *restrict v = squares->values + r * PADDED, *restrict fours = squares->fours + r * PADDED;
    const element *restrict zr = z + r * MAPS, *restrict gr = g + r * MAPS;
    real *restrict direct_r = direct + r * MAPS, *restrict inner_r = inner->values + r * PADDED + (WINDOW - 1) / 2;
#pragma GCC ivdep
    for (long k = 0; k < MAPS; k++) {
      real d = 1 + scale * window_sum(v, fours, k);
      real decay = decayed(d), inverse_root = d * (decay * decay); /* d^-1/2 */
      direct_r[k] = load(gr[k]) * decay;
      inner_r[k] = direct_r[k] * rectified(load(zr[k])) * (inverse_root * inverse_root);
    }
  }
  sum_fours(inner, rows);
  for (long r = 0; r < rows; r++) {
    const real *restrict v = inner->values + r * PADDED, *restrict fours = inner->fours + r * PADDED;
    const real *restrict direct_r = direct + r * MAPS;
    const element *restrict zr = z + r * MAPS;
    element *restrict dzr = dz + r * MAPS;
#pragma GCC ivdep
    for (long k = 0; k < MAPS; k++) {
      real x = load(zr[k]);
      real dx = direct_r[k] - (real)1.5 * scale * x * window_sum(v, fours, k);
      dzr[k] = rounded(RECTIFIED && x <= 0 ? 0 : dx);
    }
  }
}

static inline long rows_from(long first, long rows) {
  return rows - first < ROWS ? rows - first : ROWS;
}

/* y = g(z), g(relu(z)) or g(relu(z + plus)). With a plus, z is overwritten by z + plus. */
void lrn_forward(element *z, const element *plus, element *y, long rows, double scale, int threads) {
#pragma omp parallel num_threads(threads) if (rows * MAPS > SMALL)
  {
    block squares = {{0}, {0}};
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row += ROWS) {
      long at = row * MAPS;
      forward_block(&squares, z + at, plus ? plus + at : 0, y + at, rows_from(row, rows), scale);
    }
  }
}

/* dz, the gradient with respect to z (and to plus), from g, the gradient with respect to y. */
void lrn_backward(const element *g, const element *z, element *dz, long rows, double scale, int threads) {
#pragma omp parallel num_threads(threads) if (rows * MAPS > SMALL)
  {
    block squares = {{0}, {0}}, inner = {{0}, {0}};
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row += ROWS) {
      long at = row * MAPS;
      backward_block(&squares, &inner, g + at, z + at, dz + at, rows_from(row, rows), scale);
    }
  }
}
