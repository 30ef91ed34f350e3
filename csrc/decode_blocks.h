// How the rows of a decode step are cut into the blocks that threads take (decode.h).
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "decode.h"

namespace {

// What reading a prefix costs beside the computing of a row, in rows.
constexpr int64_t READING = 2;

// Cuts the rows of a decode step into blocks, none longer than `most`, of neighbours that have the
// same prefix; those of one prefix are of about the same length. Rows with a prefix of less than a
// tile have nothing to share.
std::vector<DecodeBlock> cut(const DecodeArguments* a, int64_t most) {
    std::vector<DecodeBlock> blocks;
    for (int64_t first = 0, end; first < a->n; first = end) {
        const int64_t last = a->spans[first][1] < DECODE_TILE ? first + 1 : a->n;
        for (end = first + 1; end < last; ++end)
            if (memcmp(a->spans[end], a->spans[first], 2 * sizeof(int32_t))) break;
        for (int64_t left = (end - first + most - 1) / most; left; --left) {
            const int64_t rows = (end - first + left - 1) / left;
            blocks.push_back({first, (int)rows});
            first += rows;
        }
    }
    return blocks;
}

// Chooses the length of blocks: longer ones read less, shorter ones leave no thread idle. In 16 bits
// the time is that of widening, which each row does for itself, and taking turns would add to it.
std::vector<DecodeBlock> blocks_of(const DecodeArguments* a, int threads) {
    if (a->dtype != FP32) return cut(a, 1);
    std::vector<DecodeBlock> best;
    int64_t least = INT64_MAX;
    for (int64_t most = DECODE_MAX_ROWS; most; most /= 2) {
        std::vector<DecodeBlock> blocks = cut(a, most);
        int64_t longest = 0;
        for (const DecodeBlock& block : blocks) longest = std::max<int64_t>(longest, block.rows);
        const int64_t turns = ((int64_t)blocks.size() * a->kv_heads + threads - 1) / threads;
        const int64_t time = turns * (longest + READING);
        if (time < least) {
            least = time;
            best = std::move(blocks);
        }
        if (longest == 1) break;
    }
    return best;
}

}  // namespace
