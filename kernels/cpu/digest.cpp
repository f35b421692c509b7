// Digests of stored keys and values, computed in place or beside a copy. Definition and reasons: kv/digest.py.
#include <cstdint>
#include <cstring>

#include "api.h"

namespace {

uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// Sum of 64-bit keys times 32-bit words, by halves of the keys: machines multiply 32 by 32 bits in one instruction, 64 by 64
// bits in several.
uint64_t keyed_sum(const uint8_t* payload, const uint64_t* keys, int64_t words) {
    uint64_t low = 0, high = 0;
    for (int64_t k = 0; k < words; k++) {
        uint32_t word;
        std::memcpy(&word, payload + 4 * k, 4);
        low += (keys[k] & 0xFFFFFFFFull) * word;
        high += (keys[k] >> 32) * word;
    }
    return low + (high << 32);
}

// Digest of rows that lie at `payload` and `scales`, which need not be in the planes.
uint64_t digest_at(const SealedPlanes& p, const uint8_t* payload, const uint8_t* scales, int64_t tokens, uint64_t place) {
    uint64_t sum = keyed_sum(payload, p.keys, tokens * p.words);
    if (scales)
        for (int64_t t = 0; t < tokens; t++) sum += p.scale_keys[t] * scales[t];
    return sum * (mixed(place ^ p.multiplier_seed) | 1) + (mixed(place ^ p.addend_seed) | 1) * (uint64_t)tokens;
}

uint64_t digest_of(const SealedPlanes& p, int64_t row, int64_t tokens, uint64_t place) {
    return digest_at(p, p.payload + row * p.words * 4, p.scales ? p.scales + row : nullptr, tokens, place);
}

// Index of the row of a block's token `offset` in the planes; pair: layer * heads + head.
int64_t row_of(const SealedPlanes& p, int64_t pair, int64_t block, int64_t offset) {
    const int64_t layer = pair / p.heads, head = pair % p.heads;
    return ((layer * p.num_blocks + block) * p.heads + head) * p.block_tokens + offset;
}

// Call `each(layer, head, row)` for every layer and head; row: index of the block's token `offset` in the planes.
template <class F>
void each_row(const SealedPlanes& p, int64_t block, int64_t offset, const F& each) {
    for (int64_t layer = 0; layer < p.layers; layer++)
        for (int64_t head = 0; head < p.heads; head++)
            each(layer, head, row_of(p, layer * p.heads + head, block, offset));
}

}  // namespace

extern "C" {

void twostroke_digest(const SealedPlanes* planes, int32_t count, const int64_t* blocks, const int64_t* offsets,
                      const int64_t* tokens, const uint64_t* places, uint64_t* digests) {
    for (int64_t i = 0; i < count; i++)
        each_row(*planes, blocks[i], offsets[i], [&](int64_t layer, int64_t head, int64_t row) {
            const int64_t at = (layer * planes->heads + head) * count + i;
            digests[at] = digest_of(*planes, row, tokens[i], places[at]);
        });
}

void twostroke_take(const SealedPlanes* planes, int32_t count, const int64_t* blocks, const int64_t* offsets,
                    const int64_t* tokens, const uint64_t* places, uint8_t* payload, uint8_t* scales, uint64_t* digests) {
    const SealedPlanes& p = *planes;
    const int64_t row_bytes = (int64_t)p.words * 4;
    for (int64_t pair = 0; pair < (int64_t)p.layers * p.heads; pair++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = row_of(p, pair, blocks[i], offsets[i]), at = pair * count + i;
            std::memcpy(payload, p.payload + row * row_bytes, tokens[i] * row_bytes);
            if (scales) std::memcpy(scales, p.scales + row, tokens[i]);
            digests[at] = digest_at(p, payload, scales, tokens[i], places[at]);  // of the copy, while it is in the L1
            payload += tokens[i] * row_bytes;
            if (scales) scales += tokens[i];
        }
}

void twostroke_put(const SealedPlanes* planes, int32_t count, const int64_t* blocks, const int64_t* offsets,
                   const int64_t* tokens, const uint8_t* payload, const uint8_t* scales) {
    const SealedPlanes& p = *planes;
    const int64_t row_bytes = (int64_t)p.words * 4;
    for (int64_t pair = 0; pair < (int64_t)p.layers * p.heads; pair++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = row_of(p, pair, blocks[i], offsets[i]);
            std::memcpy(const_cast<uint8_t*>(p.payload) + row * row_bytes, payload, tokens[i] * row_bytes);
            if (scales) std::memcpy(const_cast<uint8_t*>(p.scales) + row, scales, tokens[i]);
            payload += tokens[i] * row_bytes;
            if (scales) scales += tokens[i];
        }
}

void twostroke_seal(const SealedPlanes* planes, int32_t components, const HashBlock* sealed, int32_t count,
                    int32_t block_units, int64_t* generations, int64_t* tokens) {
    for (int32_t i = 0; i < count; i++) {
        const HashBlock& b = sealed[i];
        const int64_t unit = b.block * block_units + b.unit;
        for (const SealedPlanes* p = planes; p < planes + components; p++)
            each_row(*p, b.block, b.unit * (p->block_tokens / block_units), [&](int64_t layer, int64_t head, int64_t row) {
                const int64_t pair = layer * p->heads + head;
                const uint64_t place = p->first_places[pair] | (uint64_t)b.number;
                p->digests[pair * p->num_blocks * block_units + unit] = digest_of(*p, row, b.tokens, place);
            });
        generations[unit] = b.generation, tokens[unit] = b.tokens;
    }
}

}  // extern "C"
