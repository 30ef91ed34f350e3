// The number of csrc/'s sources (mr1_fast/kernels/csrc_digest.py) when a library was built. Its
// callers pack structs byte by byte: native.py refuses a library of other sources.
#pragma once
#include <stdint.h>

extern "C" __attribute__((visibility("default"))) uint64_t mr1_sources() { return MR1_SOURCES; }
