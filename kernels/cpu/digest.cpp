// Digests of stored keys and values, computed in place. Definition and reasons: kv/digest.py.
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

uint64_t digest_of(const SealedPlanes& p, int64_t row, int64_t tokens, uint64_t place) {
    uint64_t sum = keyed_sum(p.payload + row * p.words * 4, p.keys, tokens * p.words);
    if (p.scales)
        for (int64_t t = 0; t < tokens; t++) sum += p.scale_keys[t] * p.scales[row + t];
    return sum * (mixed(place ^ p.multiplier_seed) | 1) + (mixed(place ^ p.addend_seed) | 1) * (uint64_t)tokens;
}

// Call `each(layer, head, row)` for every layer and head; row: index of the block's token `offset` in the planes.
template <class F>
void each_row(const SealedPlanes& p, int64_t block, int64_t offset, const F& each) {
    for (int64_t layer = 0; layer < p.layers; layer++)
        for (int64_t head = 0; head < p.heads; head++)
            each(layer, head, ((layer * p.num_blocks + block) * p.heads + head) * p.block_tokens + offset);
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
