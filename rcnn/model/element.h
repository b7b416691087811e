/* The type of a tensor's elements, and of the arithmetic on them, by the macros of the file that includes this:
 *
 *   REAL       the type of the arithmetic: float or double
 *   BFLOAT16   1: the elements are bfloat16; 0: their type is REAL
 */
#pragma once

#include <stdint.h>

typedef REAL real;

#if BFLOAT16
typedef uint16_t element;
typedef union { uint32_t bits; float value; } word;
static inline real load(element narrow) {
  return (word){.bits = (uint32_t)narrow << 16}.value;
}
static inline element rounded(real wide) { /* to nearest, ties to even; NaN stays NaN */
  uint32_t bits = (word){.value = wide}.bits;
  return wide != wide ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
#else
typedef real element;
static inline real load(element same) { return same; }
static inline element rounded(real same) { return same; }
#endif

enum { SMALL = 1 << 14 }; /* up to this many elements, starting other threads does not pay */
