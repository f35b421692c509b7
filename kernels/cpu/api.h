// The interface between Python and C++: every struct that crosses and every exported function, declared here and nowhere else.
// library.py mirrors both as ctypes; tests/kernels/test_api.py compares them. Memory belongs to the caller and is used only
// until the call returns. One thread at a time may use one Threads.
#pragma once

#include <cstdint>

class Threads;  // threads.h
class Group;    // group.h

// INT8, FP8 (e4m3), E5M2 and CHANNEL are also codecs of the cache, with one scale byte per row. CHANNEL: INT8 keys whose channels
// were divided by powers of two, which the first row of their sixteen decides (kernels/reference_codecs.py).
enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, FP8 = 3, CODED = 4, INT4 = 5, FLOAT16 = 6, E5M2 = 7, CHANNEL = 8 };
enum Activation : int32_t { NO_ACTIVATION = -1, SILU = 0, GELU_TANH = 1, CLAMPED_SWIGLU = 2 };

// Part of the last layer that a call of twostroke_layers computes. Most rows of a prompt need only their keys and values there.
// A step then makes two calls: all layers for all rows, with KEYS_ONLY in the last one; then the last layer alone, with
// QUERIES_ONLY, for the rows whose hidden state is read. Their keys and values are stored by then.
enum LastLayer : int32_t { WHOLE = 0, KEYS_ONLY = 1, QUERIES_ONLY = 2 };

// Failure of a call of a group: GROUP_DIFFERS: the ranks made different calls, and each of them got this answer. Or, for this and all
// later calls, why * 256 + 1 + the rank that is gone.
enum GroupFailure : int32_t { GROUP_DIFFERS = -1 };
// DECLARED by twostroke_fail_group; SILENT: its process is dead or frozen; LEFT the group; LATE: it made no call in time.
enum WhyGone : int32_t { DECLARED = 0, SILENT = 1, LEFT = 2, LATE = 3 };

extern "C" {

// A matrix [columns, inner] in panels of 16 columns, one every panel_bytes. Layout of a panel: linear/linear.cpp, linear/int8.cpp,
// linear/int4.h.
struct Matrix {
    const void* panels;
    const float* scales;  // INT8: one per column; else null
    const float* bias;    // one per column, or null
    int64_t panel_bytes;
    int32_t kind, columns, inner;
    int32_t float32_out;  // 1: Python makes `out` float32, for x of any kind. Kernels read Rows::kind instead.
    // INT4 only. `group`, a multiple of 8 that divides inner: neighbours in k that share a scale of kind scale_kind (FLOAT32,
    // BFLOAT16 or FLOAT16) and, with has_zeros, a zero point.
    int32_t group, scale_kind, has_zeros, reserved;
    const int32_t* order;  // [inner]: number k of a column multiplies number order[k] of a row; null: number k
};

// Rows of numbers: row r starts at data + r * stride numbers.
struct Rows {
    void* data;
    int64_t stride;  // in numbers
    int32_t rows, kind;
};

// One component of one layer in the cache: payload [blocks, heads, block_tokens, row bytes], scales [blocks, heads, block_tokens].
struct Plane {
    const uint8_t *payload, *scales;
    int32_t codec, heads, block_tokens, width;
};

// Rows of one component to store: x [rows, heads * width], and the planes that they go into.
struct StorePart {
    Rows x;
    uint8_t *payload, *scales;
    int32_t heads, width, codec, block_tokens;
};

// Rows [row, row + count) of a batch, which belong to one sequence and begin at its position `start`; the sequence's blocks.
struct AttendSpan {
    const int32_t* blocks;
    int32_t row, start, count, reserved;
};

// Attention of one layer.
struct Attend {
    Rows queries[2];  // per part: heads * width numbers per row
    Plane keys[2];
    Plane values;
    Rows out;
    const AttendSpan* spans;
    const float* sinks;                           // per head: a score without a value, in the softmax of its rows; or null
    int32_t num_parts, num_spans, heads, window;  // window 0: none
    float scale, softcap;                         // softcap 0: none
};

struct NormWeight {
    const float* weight;  // null: the layer has no such norm
    float eps;
    int32_t reserved;
};

// A decoder layer with plain attention and a dense gate, and its planes in the cache.
struct Layer {
    NormWeight attention_norm, after_attention, ffn_norm, after_ffn, q_norm, k_norm;
    Matrix qkv, output, gate_up, down;
    Plane keys, values;
    float scale, softcap;
    int32_t window, rope;
};

// Part of a low-rank change of a matrix: adds scale * up^T (down x) to columns of the product y with a row x.
// down [rank, inner] and up [rank, count padded to 32 by zeros], rows dense, of `kind` FLOAT32 or BFLOAT16. In bfloat16 every 32
// columns of up are stored as pairs: 0 with 16, 1 with 17, and so on. Number j of the change is column
// first + j / 16 * step + j % 16 of y; step is 16, or 32 where the matrix's panels alternate between gate and up.
struct LowRank {
    const void *down, *up;
    float scale;
    int32_t kind, rank, inner, count, first, step, reserved;
};

// Matrices of a layer, in the order of AdapterRows::starts.
enum Adapted : int32_t { ADAPTED_QKV = 0, ADAPTED_OUTPUT = 1, ADAPTED_GATE_UP = 2, ADAPTED_DOWN = 3, NUM_ADAPTED = 4 };

// Rows of a batch that one adapter changes. Its parts for place p are [starts[p], starts[p + 1]); the place of a matrix is
// layer * NUM_ADAPTED + the matrix. No row is changed by two adapters.
struct AdapterRows {
    const LowRank* parts;
    const int32_t* starts;
    const int64_t* rows;
    int32_t num_rows, reserved;
};

// Rows of one step and the buffers that they pass through.
struct Step {
    void *x, *h, *qkv, *mixed, *gated, *delta;  // [rows, ...]: hidden, hidden, qkv's columns, q's columns, ffn, hidden
    uint32_t* scratch;                          // as for twostroke_linear, for the widest input
    const float *cos[2], *sin[2];               // per rope: [rows, half]
    const int64_t* slots;
    const AttendSpan* spans;
    int32_t *refused, *non_finite;  // [rows]: scratch; sum over the layers (the caller writes zeros first)
    int32_t rows, kind, num_spans, hidden, heads, kv_heads, width, ffn, activation, half[2];
    int32_t last_layer;
    Group* group;  // null: this rank holds the whole model. Else `output` and `down` give partial sums, added over the ranks
    const AdapterRows* adapters;  // none, if there is a group or last_layer is not WHOLE
    void* halves;                 // [rows, gate_up's columns]; null if there are no adapters
    int32_t num_adapters, reserved;
};

// Planes of one component [layers, num_blocks, heads, block_tokens, ...], the keys of its digests and where these are written.
struct SealedPlanes {
    const uint8_t *payload, *scales;    // scales: or null
    const uint64_t *keys, *scale_keys;  // [tokens of a hash block, words]; [tokens of a hash block]
    const uint64_t* first_places;       // [layers, heads]: place of a sequence's first hash block; twostroke_seal only
    uint64_t* digests;                  // [layers, heads, num_blocks, hash blocks per block]
    uint64_t multiplier_seed, addend_seed;
    int64_t num_blocks;
    int32_t layers, heads, block_tokens, words;  // words of 32 bits per row
};

// A hash block to seal: `unit` counts hash blocks within the block, `number` within the sequence. `generation` is the use of the
// block, `tokens` the number of its tokens that are present.
struct HashBlock {
    int64_t block, unit, generation, number, tokens;
};

// Rows [row, row + count) of a sequence, the state from which it goes on, and its marks. A state: memory [heads, key_width,
// value_width], and the last inputs of the convolution [num_taps - 1, channels].
struct DeltaSpan {
    const float *memory, *conv;
    int32_t row, count, first_mark, num_marks;
};

// A state that receives a sequence's after so many of its rows, one at least.
struct DeltaMark {
    float *memory, *conv;
    int32_t rows, reserved;
};

// One gated delta net in one step. Channels: queries and keys [key_heads * key_width] each, values [heads * value_width].
struct Delta {
    Rows x;                                        // [rows, channels]
    const float *rates, *taps, *decay, *step_bias;  // [rows, 2 * heads]; [num_taps, channels]; [heads] each
    float *mixed, *numbers;                        // scratch: [rows, channels]; [rows, heads, 3]
    Rows out;                                      // [rows, heads * value_width]
    const DeltaSpan* spans;
    const DeltaMark* marks;  // those of a span one behind the other, ascending by rows
    int32_t num_spans, num_taps, key_heads, heads, key_width, value_width;
};

// ---------------------------------------------------------------- library and threads

// Name of the instruction set that decides the bits of answers.
const char* twostroke_level();
// 0 if the kernels compute correctly on this machine. Run once after building, in a process of its own.
int32_t twostroke_self_check();

Threads* twostroke_start_threads(int32_t count);
void twostroke_stop_threads(Threads* threads);

// ---------------------------------------------------------------- matrices

// Bytes of one panel of a matrix of `kind`, except CODED and INT4. pairs: 1 if the rows that it is multiplied with are bfloat16.
int64_t twostroke_panel_bytes(int32_t kind, int32_t inner, int32_t pairs);

// Bytes of one panel of this bfloat16 matrix in the CODED form. 0: the form does not pay, because too many weights are odd
// (linear/coded.h) or the machine lacks the instructions.
int64_t twostroke_coded_panel_bytes(Threads* threads, const uint16_t* from, int32_t columns, int32_t inner);

// Copy numbers [columns, inner] into panels of `kind`. CODED panels are made from bfloat16.
void twostroke_pack(Threads* threads, const void* from, int32_t kind, int32_t columns, int32_t inner, int32_t pairs,
                    int64_t panel_bytes, void* to);

// Bytes of one panel of an INT4 matrix; fields as in Matrix.
int64_t twostroke_int4_panel_bytes(int32_t inner, int32_t group, int32_t scale_kind, int32_t has_zeros);

// Copy numbers [columns, inner / 2], the first of two in a byte's low bits, scales [columns, inner / group] of scale_kind and zero
// points [columns, inner / group] (has_zeros; 0 to 15) into matrix->panels. A number q counts as (q - zero) * scale; without zero
// points, zero is 8.
void twostroke_pack_int4(Threads* threads, const uint8_t* numbers, const void* scales, const uint8_t* zeros, const Matrix* matrix);

// out [rows, columns] = x [rows, inner] times the matrix. x: float32, or bfloat16 (inner even, unless the weights are int8).
// scratch: at least (rows + 32) * (4 * inner + 16) bytes, 64-byte aligned. out must not overlap x.
// With an activation, panels of the matrix alternate between gate and up, and out [rows, columns of up] is
// activation(gate) * up, or the clamped form of simd.h. out_columns: columns of out.
void twostroke_linear(Threads* threads, const Matrix* matrix, const Rows* x, const Rows* out, int32_t activation,
                      int32_t out_columns, uint32_t* scratch);

// out [rows, columns] float32 = norm(x) times the matrix; least, greatest, best [rows] as in twostroke_extremes.
// h [rows, inner], of x's kind, and scratch, as for twostroke_linear, are overwritten.
void twostroke_head(Threads* threads, const Matrix* matrix, const float* weight, float eps, const Rows* x, const Rows* h,
                    const Rows* out, uint32_t* scratch, float* least, float* greatest, int32_t* best);

// y += the changes of all adapters at `place`, for their rows; y = x times the matrix of that place, with its panels' order
// of columns. Changes are float32; their sum with y is rounded once. A row's bits depend on that row alone.
void twostroke_add_changes(Threads* threads, const AdapterRows* adapters, int32_t count, int32_t place, const Rows* x,
                           const Rows* y);

// out [rows, columns] = activation(gate) * up, of rows of halves whose panels alternate between gate and up: the bits of
// twostroke_linear with this activation.
void twostroke_gate(Threads* threads, const Rows* halves, const Rows* out, int32_t activation, int32_t columns);

// ---------------------------------------------------------------- rows

// out = x / sqrt(mean(x**2) + eps) * weight, for each of `vectors` vectors of `width` numbers per row.
// delta: null, or rows that are added to x first; the sum is rounded to x's kind and stored in x (then vectors is 1).
void twostroke_rms_norm(Threads* threads, const Rows* x, const Rows* delta, const float* weight, float eps,
                        int32_t vectors, int32_t width, const Rows* out);

// Convolution and recurrence of all spans, token by token. Rows of `out` that belong to no span are left unchanged. No state that
// is read may be written. heads is a multiple of key_heads.
void twostroke_delta(Threads* threads, const Delta* job);

// Rotate in place the first 2 * half numbers of each of `heads` vectors of `width` numbers per row.
// cos and sin [rows, half] float32. Pairs are (i, i + half), or (2i, 2i + 1) if interleaved is 1.
void twostroke_rotary(Threads* threads, const Rows* x, int32_t heads, int32_t width, const float* cos, const float* sin,
                      int32_t half, int32_t interleaved);

// Per row of x [rows, width] float32: its least number (NaN if the row holds one), its greatest, and the first index of the
// greatest. In a row with a NaN the last two are arbitrary, but the index is in range.
void twostroke_extremes(Threads* threads, const Rows* x, int32_t width, float* least, float* greatest, int32_t* best);

// ---------------------------------------------------------------- cache

// Encode rows and store them at `slots` [rows]; rows with a negative slot are skipped. non_finite [rows]: number of vectors of
// the row that held a NaN or an infinity. Those are stored as zeros.
void twostroke_write(Threads* threads, const StorePart* parts, int32_t num_parts, const int64_t* slots, int32_t rows,
                     int32_t* non_finite);

// Attention of the spans' rows to the cache. Rows of `out` that belong to no span are left unchanged.
void twostroke_attend(Threads* threads, const Attend* job);

// All `count` layers over the rows of a step. Returns the number of vectors of keys and values that were not finite; INT64_MIN +
// 1 + a GroupFailure if the step's group failed: then the rows hold anything.
int64_t twostroke_layers(Threads* threads, const Layer* layers, int32_t count, const Step* step);

// Digests of `count` hash blocks. Number i begins at token offsets[i] of block blocks[i]; tokens[i] of its tokens are present.
// places and digests [layers, heads, count].
void twostroke_digest(const SealedPlanes* planes, int32_t count, const int64_t* blocks, const int64_t* offsets,
                      const int64_t* tokens, const uint64_t* places, uint64_t* digests);

// Copy `count` hash blocks, named as for twostroke_digest, one behind the other into payload [layers, heads, rows, words of 32 bits]
// and scales [layers, heads, rows] (null: the planes have none); rows: the sum of tokens. digests [layers, heads, count] are those
// of the copies.
void twostroke_take(const SealedPlanes* planes, int32_t count, const int64_t* blocks, const int64_t* offsets,
                    const int64_t* tokens, const uint64_t* places, uint8_t* payload, uint8_t* scales, uint64_t* digests);

// Copy rows in the layout of twostroke_take into the planes.
void twostroke_put(const SealedPlanes* planes, int32_t count, const int64_t* blocks, const int64_t* offsets,
                   const int64_t* tokens, const uint8_t* payload, const uint8_t* scales);

// Digest `count` hash blocks of all components into SealedPlanes::digests, and record in generations and tokens [num_blocks,
// hash blocks per block] for which use of its block, and up to which token, each is sealed.
void twostroke_seal(const SealedPlanes* planes, int32_t components, const HashBlock* sealed, int32_t count,
                    int32_t block_units, int64_t* generations, int64_t* tokens);

// ---------------------------------------------------------------- ranks of one model on one machine

// Bytes of the memory that the processes of `size` ranks share. It begins as zeros. slot_bytes: what one rank gives to a call at
// once; larger calls take several turns.
int64_t twostroke_group_bytes(int32_t size, int64_t slot_bytes);

// Become a rank, once per rank and region. Every rank makes the same calls in the same order, from one thread at a time. A call waits
// at most timeout_ms for the other ranks. A rank is gone, also between calls, if its process shows no life for silence_ms and the
// system says that it is dead or stopped; or for ten times as long.
Group* twostroke_join_group(void* region, int32_t rank, int32_t size, int64_t slot_bytes, int32_t timeout_ms, int32_t silence_ms);
void twostroke_leave_group(Group* group);

// From any thread: declare a rank gone, which ends all waits of all ranks; the failure of the group, or 0.
void twostroke_fail_group(Group* group, int32_t rank);
int32_t twostroke_group_failure(Group* group);

// The following return 0 or a GroupFailure.
// x = sum of all ranks' x, added in float32 in the order of ranks and rounded once: FLOAT32 or BFLOAT16. threads may be null.
int32_t twostroke_all_reduce(Group* group, Threads* threads, void* x, int64_t numbers, int32_t kind);
// to [rows, ranks, row_bytes] = all ranks' from [rows, row_bytes]; row_bytes at most slot_bytes. to: null where it is not needed.
int32_t twostroke_all_gather(Group* group, const void* from, int64_t rows, int64_t row_bytes, void* to);
// all [ranks] = every rank's number.
int32_t twostroke_agree(Group* group, int64_t mine, int64_t* all);

}  // extern "C"
