// Seals of stored keys and values where they lie. The definition, with its reasons, is kv/digest.py.
#include <cstdint>
#include <cstring>

namespace {

uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// A product by halves: machines multiply 32 bits by 32 in one instruction, 64 by 64 in several.
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

}  // namespace

extern "C" {

// One component's planes [layers, num_blocks, heads, block_tokens, ...], and the keys of a hash block's tokens.
struct SealedPlanes {
    const uint8_t *payload, *scales;  // scales: or null
    const uint64_t *keys, *scale_keys;  // [tokens of a hash block, words], [tokens of a hash block]
    uint64_t multiplier_seed, addend_seed;
    int64_t num_blocks;
    int32_t layers, heads, block_tokens, words;  // words of 32 bits per row
};

// Digest `count` hash blocks: number i lies in block blocks[i] from token offsets[i] on, tokens[i] of it are there.
// places and digests [layers, heads, count].
void twostroke_digest(const SealedPlanes* planes, int32_t count, const int64_t* blocks, const int64_t* offsets,
                      const int64_t* tokens, const uint64_t* places, uint64_t* digests) {
    const SealedPlanes& p = *planes;
    for (int64_t layer = 0; layer < p.layers; layer++)
        for (int64_t head = 0; head < p.heads; head++)
            for (int64_t i = 0; i < count; i++) {
                const int64_t row = ((layer * p.num_blocks + blocks[i]) * p.heads + head) * p.block_tokens + offsets[i];
                uint64_t sum = keyed_sum(p.payload + row * p.words * 4, p.keys, tokens[i] * p.words);
                if (p.scales)
                    for (int64_t t = 0; t < tokens[i]; t++) sum += p.scale_keys[t] * p.scales[row + t];
                const int64_t at = (layer * p.heads + head) * count + i;
                const uint64_t multiplier = mixed(places[at] ^ p.multiplier_seed) | 1;
                const uint64_t addend = mixed(places[at] ^ p.addend_seed) | 1;
                digests[at] = sum * multiplier + addend * (uint64_t)tokens[i];
            }
}

}  // extern "C"
