// All layers of a decoder with plain attention and dense gates in one call, without Python between ops. The ops and their
// order are those of model/decoder/decoder.py, so the bits are the same.
#include <cstdint>

#include "api.h"
#include "group.h"
#include "simd.h"
#include "threads.h"

namespace {

class Stack {
   public:
    Stack(Threads* threads, const Step& step) : threads_(threads), s_(step) {}

    void run(const Layer* layers, int count) {
        norm(s_.x, nullptr, layers[0].attention_norm, s_.h);
        for (int i = 0; i < count; i++) {
            const Layer& layer = layers[i];
            if (i + 1 == count && s_.last_layer == KEYS_ONLY) return keep(layer);
            attend(layer, i);
            if (failure_) return;
            if (layer.after_attention.weight) norm(s_.delta, nullptr, layer.after_attention, s_.delta);
            norm(s_.x, s_.delta, layer.ffn_norm, s_.h);
            gate(layer, i);
            add_up(layer.down, s_.gated, s_.ffn);
            change(i, ADAPTED_DOWN, rows(s_.gated, s_.ffn), rows(s_.delta, s_.hidden));
            if (failure_) return;
            if (layer.after_ffn.weight) norm(s_.delta, nullptr, layer.after_ffn, s_.delta);
            if (i + 1 < count)
                norm(s_.x, s_.delta, layers[i + 1].attention_norm, s_.h);
            else
                add();
        }
    }

    int64_t refused() const { return failure_ ? INT64_MIN + 1 + failure_ : refused_; }

   private:
    Rows rows(void* data, int64_t stride, int64_t first = 0) const {
        return {(char*)data + first * (s_.kind == BFLOAT16 ? 2 : 4), stride, s_.rows, s_.kind};
    }
    void norm(void* x, void* delta, const NormWeight& by, void* out) {
        const Rows from = rows(x, s_.hidden), to = rows(out, s_.hidden), more = rows(delta, s_.hidden);
        twostroke_rms_norm(threads_, &from, delta ? &more : nullptr, by.weight, by.eps, 1, s_.hidden, &to);
    }
    void linear(const Matrix& by, void* x, int in, void* out, int columns, int activation) {
        const Rows from = rows(x, in), to = rows(out, columns);
        twostroke_linear(threads_, &by, &from, &to, activation, columns, s_.scratch);
    }
    // delta = x times the matrix. With a group: the sum over its ranks, in float32 until it is rounded once.
    void add_up(const Matrix& by, void* x, int in) {
        if (!s_.group) return linear(by, x, in, s_.delta, s_.hidden, NO_ACTIVATION);
        const int64_t numbers = (int64_t)s_.rows * s_.hidden;
        float* partial = s_.group->partial(numbers);
        const Rows from = rows(x, in), to{partial, s_.hidden, s_.rows, FLOAT32};
        twostroke_linear(threads_, &by, &from, &to, NO_ACTIVATION, s_.hidden, s_.scratch);
        failure_ = s_.group->sum(threads_, partial, s_.delta, numbers, s_.kind);
    }

    bool changes(int layer, int matrix) const {
        const int place = layer * NUM_ADAPTED + matrix;
        for (int a = 0; a < s_.num_adapters; a++)
            if (s_.adapters[a].starts[place] < s_.adapters[a].starts[place + 1]) return true;
        return false;
    }
    void change(int layer, int matrix, const Rows& x, const Rows& y) {
        if (s_.num_adapters)
            twostroke_add_changes(threads_, s_.adapters, s_.num_adapters, layer * NUM_ADAPTED + matrix, &x, &y);
    }
    void gate(const Layer& layer, int i) {
        if (!changes(i, ADAPTED_GATE_UP)) return linear(layer.gate_up, s_.h, s_.hidden, s_.gated, s_.ffn, s_.activation);
        const Rows halves = rows(s_.halves, layer.gate_up.columns), out = rows(s_.gated, s_.ffn);
        linear(layer.gate_up, s_.h, s_.hidden, s_.halves, layer.gate_up.columns, NO_ACTIVATION);
        change(i, ADAPTED_GATE_UP, rows(s_.h, s_.hidden), halves);
        twostroke_gate(threads_, &halves, &out, s_.activation, s_.ffn);
    }

    // Columns [first, first + columns) of a matrix; `first` is a multiple of 16.
    Matrix slice(const Matrix& by, int first, int columns) const {
        Matrix part = by;
        part.panels = (const char*)by.panels + first / simd::LANES * by.panel_bytes;
        if (by.scales) part.scales = by.scales + first;
        if (by.bias) part.bias = by.bias + first;
        part.columns = columns;
        return part;
    }

    int queries() const { return s_.heads * s_.width; }
    int kept() const { return s_.kv_heads * s_.width; }
    Rows head_rows(int first) const { return rows(s_.qkv, queries() + 2 * kept(), first); }

    void project(const Matrix& by, int first, int columns) {
        const Rows from = rows(s_.h, s_.hidden), to = head_rows(first);
        twostroke_linear(threads_, &by, &from, &to, NO_ACTIVATION, columns, s_.scratch);
    }
    void norm_heads(const NormWeight& by, const Rows& x, int heads) {
        if (by.weight) twostroke_rms_norm(threads_, &x, nullptr, by.weight, by.eps, heads, s_.width, &x);
    }
    void rotate(const Layer& layer, const Rows& x, int heads) {
        const int rope = layer.rope;
        twostroke_rotary(threads_, &x, heads, s_.width, s_.cos[rope], s_.sin[rope], s_.half[rope], 0);
    }

    void attend(const Layer& layer, int i) {
        const bool stores = s_.last_layer != QUERIES_ONLY;
        const Rows q = head_rows(0), k = head_rows(queries());
        if (stores)
            project(layer.qkv, 0, queries() + 2 * kept());
        else
            project(slice(layer.qkv, 0, queries()), 0, queries());
        change(i, ADAPTED_QKV, rows(s_.h, s_.hidden), head_rows(0));
        norm_heads(layer.q_norm, q, s_.heads);
        if (stores) norm_heads(layer.k_norm, k, s_.kv_heads);
        rotate(layer, q, s_.heads + (stores ? s_.kv_heads : 0));
        if (stores) store(layer);
        Attend job{};
        job.queries[0] = q, job.keys[0] = layer.keys, job.values = layer.values;
        job.out = rows(s_.mixed, queries()), job.spans = s_.spans, job.num_parts = 1, job.num_spans = s_.num_spans;
        job.heads = s_.heads, job.window = layer.window, job.scale = layer.scale, job.softcap = layer.softcap;
        twostroke_attend(threads_, &job);
        add_up(layer.output, s_.mixed, queries());
        change(i, ADAPTED_OUTPUT, rows(s_.mixed, queries()), rows(s_.delta, s_.hidden));
    }

    // Compute and store keys and values, without queries.
    void keep(const Layer& layer) {
        const Rows k = head_rows(queries());
        project(slice(layer.qkv, queries(), 2 * kept()), queries(), 2 * kept());
        norm_heads(layer.k_norm, k, s_.kv_heads);
        rotate(layer, k, s_.kv_heads);
        store(layer);
    }

    void store(const Layer& layer) {
        const StorePart parts[2] = {part(layer.keys, head_rows(queries())),
                                    part(layer.values, head_rows(queries() + kept()))};
        twostroke_write(threads_, parts, 2, s_.slots, s_.rows, s_.refused);
        for (int r = 0; r < s_.rows; r++) s_.non_finite[r] += s_.refused[r], refused_ += s_.refused[r];
    }
    static StorePart part(const Plane& plane, const Rows& x) {
        return {x, (uint8_t*)plane.payload, (uint8_t*)plane.scales, plane.heads, plane.width, plane.codec,
                plane.block_tokens};
    }

    // x += delta, rounded to x's kind.
    void add() {
        const int64_t numbers = (int64_t)s_.rows * s_.hidden;
        for (int64_t i = 0; i < numbers; i++) {
            if (s_.kind == FLOAT32) {
                ((float*)s_.x)[i] += ((const float*)s_.delta)[i];
            } else {
                uint16_t* x = (uint16_t*)s_.x + i;
                const float sum = simd::to_float(*x) + simd::to_float(((const uint16_t*)s_.delta)[i]);
                *x = simd::narrow(simd::splat(sum))[0];
            }
        }
    }

    Threads* threads_;
    const Step& s_;
    int64_t refused_ = 0;
    int32_t failure_ = 0;  // of the group
};

}  // namespace

extern "C" int64_t twostroke_layers(Threads* threads, const Layer* layers, int32_t count, const Step* step) {
    Stack stack(threads, *step);
    stack.run(layers, count);
    return stack.refused();
}
