// WindowAttention on tensor cores: exact softmax of tiles of 64 queries over the keys that any of them attends to,
// block by block (Milakov and Gimelshein's online softmax; FlashAttention's order of work).
#pragma once
#include "window_keys.cuh"

#ifdef LF_TENSOR_CORES
namespace lf {

/// Queries of a block: 8 x 8 of the image, or 64 of the text.
constexpr int TILE_SIDE = 8;
constexpr int TILE_QUERIES = TILE_SIDE * TILE_SIDE;

/// Heads of up to `Width` elements, `RowTiles` tiles of 16 queries a warp, `Keys` keys at a time.
template <typename Element, int Width_, int RowTiles_, int Keys_>
struct FlashShape {
    typedef Element T;
    static constexpr int Width = Width_;
    static constexpr int RowTiles = RowTiles_;
    static constexpr int Keys = Keys_;
    static constexpr int Steps = Width / 16;
    static constexpr int Warps = TILE_QUERIES / (16 * RowTiles);
    static constexpr int Threads = 32 * Warps;
    static constexpr int Row = (Width / 8) % 2 == 1 ? Width * 2 : Width * 2 + 16;
    static constexpr int QueryBytes = TILE_QUERIES * Row;
    static constexpr int StageBytes = 2 * Keys * Row;
    static constexpr int Lists = 3;
    /// Wide queries don't fit into registers beside the sums.
    static constexpr bool QueriesInRegisters = Width <= 128;
};

/// One block's queries, all with the keys of one list.
///
/// Shared memory: queries [64][Row], two stages of keys and values [2][Keys][Row], three lists of [Keys] keys.
template <typename Shape, typename KeyList>
struct Flash {
    typedef typename Shape::T T;
    const LfWindow& p;
    KeyList keys;
    Rows<const T> q, k, v;
    unsigned char* shared;
    /// One of this thread's queries each: rows g and g + 8 of its warp's tiles.
    Reach reach[Shape::RowTiles][2];
    FragmentA queries[Shape::RowTiles][Shape::QueriesInRegisters ? Shape::Steps : 1];
    FragmentC sums[Shape::RowTiles][Shape::Width / 8];
    /// Largest score so far, in units of log2; sum of exponentials, this thread's share.
    float largest[Shape::RowTiles][2], total[Shape::RowTiles][2];

    LF_DEVICE Flash(const LfWindow& p, const KeyList& keys, int batch, int head, unsigned char* shared)
        : p(p), keys(keys), q(p.q, batch, head), k(p.k, batch, head), v(p.v, batch, head), shared(shared) {
        LF_UNROLL
        for (int m = 0; m < Shape::RowTiles; ++m) {
            LF_UNROLL
            for (int half = 0; half < 2; ++half) {
                largest[m][half] = -INFINITY;
                total[m][half] = 0.0f;
            }
            LF_UNROLL
            for (int n = 0; n < Shape::Width / 8; ++n) {
                LF_UNROLL
                for (int c = 0; c < 4; ++c) sums[m][n][c] = 0.0f;
            }
        }
    }

    /// Where the rows of this warp's queries begin in the tile.
    LF_DEVICE int first_query() const { return warp_index() * Shape::RowTiles * 16; }
    /// Row of the tile that `half` of this thread's row tile `m` is.
    LF_DEVICE int query_of(int m, int half) const { return first_query() + m * 16 + half * 8 + (lane_index() >> 2); }

    LF_DEVICE Key* list(int block) {
        unsigned char* lists = shared + Shape::QueryBytes + 2 * Shape::StageBytes;
        return reinterpret_cast<Key*>(lists) + block % Shape::Lists * Shape::Keys;
    }

    LF_DEVICE unsigned char* stage(int block) { return shared + Shape::QueryBytes + block % 2 * Shape::StageBytes; }

    LF_DEVICE void write_list(int block) {
        for (int i = thread_index(); i < Shape::Keys; i += Shape::Threads) list(block)[i] = keys.at(block * Shape::Keys + i);
    }

    /// Begins to copy one row's chunk; zeros behind `width` and where the row doesn't exist.
    LF_DEVICE void copy_chunk(unsigned char* row, const Rows<const T>& from, int token, int chunk, int width, bool exists) {
        const bool valid = exists && chunk * 8 < width;
        copy_async(row + chunk * 16, from.row(token) + (valid ? chunk * 8 : 0), valid);
    }

    LF_DEVICE void fetch(int block) {
        const Key* from = list(block);
        unsigned char* to = stage(block);
        constexpr int chunks = Shape::Width / 8;
        for (int i = thread_index(); i < Shape::Keys * chunks; i += Shape::Threads) {
            const int key = i / chunks, chunk = i % chunks;
            const int token = from[key].token;
            const bool exists = from[key].row != NO_QUERY;
            copy_chunk(to + key * Shape::Row, k, token, chunk, p.head_dim, exists);
            copy_chunk(to + (Shape::Keys + key) * Shape::Row, v, token, chunk, p.value_dim, exists);
        }
    }

    /// Begins to copy row `i` of the tile, for i from this warp's first row on.
    template <typename TokenOf>
    LF_DEVICE void fetch_queries(TokenOf token_of) {
        constexpr int chunks = Shape::Width / 8;
        for (int i = lane_index(); i < Shape::RowTiles * 16 * chunks; i += 32) {
            const int row = first_query() + i / chunks;
            const int token = token_of(row);
            copy_chunk(shared + row * Shape::Row, q, larger(token, 0), i % chunks, p.head_dim, token >= 0);
        }
    }

    LF_DEVICE void load_query(FragmentA& to, int m, int step) {
        const int lane = lane_index();
        load_matrices(to, shared + (first_query() + m * 16 + (lane & 15)) * Shape::Row + step * 32 + (lane >> 4) * 16);
    }

    /// Attends to all keys of the list.
    template <typename TokenOf>
    LF_DEVICE void run(TokenOf token_of) {
        const int blocks = (keys.count() + Shape::Keys - 1) / Shape::Keys;
        fetch_queries(token_of);
        write_list(0);
        write_list(1);
        barrier();
        if (blocks > 0) fetch(0);
        copy_commit();
        for (int block = 0; block < blocks; ++block) {
            copy_wait<0>();
            barrier();
            // All have read the other stage, and the list of the block before.
            if (block + 1 < blocks) fetch(block + 1);
            copy_commit();
            write_list(block + 2);
            if (block == 0 && Shape::QueriesInRegisters) {
                LF_UNROLL
                for (int m = 0; m < Shape::RowTiles; ++m) {
                    LF_UNROLL
                    for (int s = 0; s < Shape::Steps; ++s) load_query(queries[m][Shape::QueriesInRegisters ? s : 0], m, s);
                }
            }
            attend(block);
        }
        copy_wait<0>();
    }

    /// Scores of a block's keys, their softmax so far, and the sums.
    LF_DEVICE void attend(int block) {
        constexpr int tiles = Shape::Keys / 8;
        const int lane = lane_index(), t = lane & 3;
        const unsigned char* key_rows = stage(block);
        const unsigned char* value_rows = key_rows + Shape::Keys * Shape::Row;
        FragmentC scores[Shape::RowTiles][tiles];
        LF_UNROLL
        for (int m = 0; m < Shape::RowTiles; ++m) {
            LF_UNROLL
            for (int n = 0; n < tiles; ++n) {
                LF_UNROLL
                for (int c = 0; c < 4; ++c) scores[m][n][c] = 0.0f;
            }
        }
        // B: columns are keys, stored as rows: no transposition.
        const unsigned char* key_at = key_rows + ((lane & 7) + (lane >> 4) * 8) * Shape::Row + (lane >> 3 & 1) * 16;
        LF_UNROLL
        for (int s = 0; s < Shape::Steps; ++s) {
            if (s * 16 >= p.head_dim) break;
            if (!Shape::QueriesInRegisters) {
                LF_UNROLL
                for (int m = 0; m < Shape::RowTiles; ++m) load_query(queries[m][0], m, s);
            }
            LF_UNROLL
            for (int n = 0; n < tiles; n += 2) {
                uint32_t pair[4];
                load_matrices(pair, key_at + n * 8 * Shape::Row + s * 32);
                const FragmentB first = {pair[0], pair[1]}, second = {pair[2], pair[3]};
                LF_UNROLL
                for (int m = 0; m < Shape::RowTiles; ++m) {
                    const int at = Shape::QueriesInRegisters ? s : 0;
                    multiply_add<T>(scores[m][n], queries[m][at], first);
                    multiply_add<T>(scores[m][n + 1], queries[m][at], second);
                }
            }
        }
        const float scale = float(p.scale) * LOG2_E;
        const Key* names = list(block);
        LF_UNROLL
        for (int n = 0; n < tiles; ++n) {
            LF_UNROLL
            for (int c = 0; c < 2; ++c) {
                const Key key = names[n * 8 + 2 * t + c];
                LF_UNROLL
                for (int m = 0; m < Shape::RowTiles; ++m) {
                    LF_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        float& score = scores[m][n][half * 2 + c];
                        score = reach[m][half].has(key.row, key.column) ? score * scale : -INFINITY;
                    }
                }
            }
        }
        LF_UNROLL
        for (int m = 0; m < Shape::RowTiles; ++m) {
            LF_UNROLL
            for (int half = 0; half < 2; ++half) rescale(scores[m], m, half);
        }
        // B: columns of values, rows are keys: transposed.
        const unsigned char* value_at = value_rows + ((lane & 7) + (lane >> 3 & 1) * 8) * Shape::Row + (lane >> 4) * 16;
        LF_UNROLL
        for (int s = 0; s < Shape::Keys / 16; ++s) {
            FragmentA weights[Shape::RowTiles];
            LF_UNROLL
            for (int m = 0; m < Shape::RowTiles; ++m) {
                LF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const FragmentC& from = scores[m][s * 2 + i / 2];
                    weights[m][i] = pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
                }
            }
            LF_UNROLL
            for (int n = 0; n < Shape::Width / 8; n += 2) {
                if (n * 8 >= p.value_dim) break;
                uint32_t pair[4];
                load_matrices_transposed(pair, value_at + s * 16 * Shape::Row + n * 16);
                const FragmentB first = {pair[0], pair[1]}, second = {pair[2], pair[3]};
                LF_UNROLL
                for (int m = 0; m < Shape::RowTiles; ++m) {
                    multiply_add<T>(sums[m][n], weights[m], first);
                    multiply_add<T>(sums[m][n + 1], weights[m], second);
                }
            }
        }
    }

    /// Turns a row's scores into weights relative to the largest score so far, and what was summed up before likewise.
    LF_DEVICE void rescale(FragmentC (&scores)[Shape::Keys / 8], int m, int half) {
        float top = largest[m][half];
        LF_UNROLL
        for (int n = 0; n < Shape::Keys / 8; ++n)
            top = larger(top, larger(scores[n][half * 2], scores[n][half * 2 + 1]));
        top = larger(top, shuffle_xor(top, 1));
        top = larger(top, shuffle_xor(top, 2));
        // No key so far: anything finite keeps infinities from meeting.
        const float base = top == -INFINITY ? 0.0f : top;
        const float before = exp2_fast(largest[m][half] - base);
        largest[m][half] = top;
        float sum = 0.0f;
        LF_UNROLL
        for (int n = 0; n < Shape::Keys / 8; ++n) {
            LF_UNROLL
            for (int c = 0; c < 2; ++c) {
                float& score = scores[n][half * 2 + c];
                score = exp2_fast(score - base);
                sum += score;
            }
        }
        total[m][half] = total[m][half] * before + sum;
        LF_UNROLL
        for (int n = 0; n < Shape::Width / 8; ++n) {
            sums[m][n][half * 2] *= before;
            sums[m][n][half * 2 + 1] *= before;
        }
    }

    /// The sum of a row's exponentials, for all threads that have a part of it.
    LF_DEVICE float row_total(int m, int half) const {
        float sum = total[m][half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        return sum;
    }
};

/// The tile's tokens of the image; -1 outside it.
struct ImageTile {
    int y0, x0, rows, cols, image_start;

    LF_DEVICE int operator()(int i) const {
        const int y = y0 + i / TILE_SIDE, x = x0 + i % TILE_SIDE;
        return y < rows && x < cols ? image_start + y * cols + x : -1;
    }
};

/// Image queries. Grid: x = head + B·H * tile of 8 x 8 queries.
template <typename Shape>
LF_DEVICE void window_kernel(const LfWindow& p) {
    typedef typename Shape::T T;
    const int all_heads = p.batch * p.heads;
    const int at = block_x() % all_heads, tile = block_x() / all_heads;
    const int batch = at / p.heads, head = at % p.heads;
    const int across = (p.cols + TILE_SIDE - 1) / TILE_SIDE;
    const ImageTile token_of{tile / across * TILE_SIDE, tile % across * TILE_SIDE, p.rows, p.cols, int(p.image_start)};
    const int y1 = smaller(token_of.y0 + TILE_SIDE, p.rows) - 1, x1 = smaller(token_of.x0 + TILE_SIDE, p.cols) - 1;
    const ImageKeys keys(p, token_of.y0, y1, token_of.x0, x1);
    unsigned char* shared = shared_memory();
    Flash<Shape, ImageKeys> flash(p, keys, batch, head, shared);
    LF_UNROLL
    for (int m = 0; m < Shape::RowTiles; ++m) {
        LF_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int i = flash.query_of(m, half);
            const int y = smaller(token_of.y0 + i / TILE_SIDE, y1), x = smaller(token_of.x0 + i % TILE_SIDE, x1);
            flash.reach[m][half] = Reach::of(p, keys, y, x);
        }
    }
    flash.run(token_of);
    // This warp's queries have been read; its results take their place.
    warp_barrier();
    const int lane = lane_index();
    LF_UNROLL
    for (int m = 0; m < Shape::RowTiles; ++m) {
        LF_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float factor = 1.0f / flash.row_total(m, half);
            unsigned char* row = shared + flash.query_of(m, half) * Shape::Row + (lane & 3) * 4;
            LF_UNROLL
            for (int n = 0; n < Shape::Width / 8; ++n) {
                const FragmentC& sums = flash.sums[m][n];
                *reinterpret_cast<uint32_t*>(row + n * 16) = pack<T>(sums[half * 2] * factor, sums[half * 2 + 1] * factor);
            }
        }
    }
    warp_barrier();
    const Rows<T> out(p.out, batch, head);
    const int chunks = p.value_dim / 8;
    for (int i = lane; i < Shape::RowTiles * 16 * chunks; i += 32) {
        const int row = flash.first_query() + i / chunks, chunk = i % chunks;
        const int token = token_of(row);
        if (token < 0) continue;
        *reinterpret_cast<Bytes16*>(out.row(token) + chunk * 8) =
            *reinterpret_cast<const Bytes16*>(shared + row * Shape::Row + chunk * 16);
    }
}

/// The tile's tokens of the text; -1 behind it.
struct TextTile {
    int first, text, text_start;

    LF_DEVICE int operator()(int i) const { return first + i < text ? text_start + first + i : -1; }
};

/// Floats of one text query's partial result: sums [Dv], the largest score in units of log2, the sum of exponentials.
LF_DEVICE int text_partial_length(int value_dim) { return value_dim + 2; }

/// Text queries over one split of all keys. Grid: x = head + B·H * split, y = 64 text queries.
/// Partial results: [B·H][splits][text] of `text_partial_length`.
template <typename Shape>
LF_DEVICE void window_text_kernel(const LfWindow& p) {
    const int all_heads = p.batch * p.heads;
    const int at = block_x() % all_heads, split = block_x() / all_heads;
    const TextTile token_of{int(block_y()) * TILE_QUERIES, p.text, int(p.text_start)};
    const int64_t start = split * p.keys_per_split;
    const AllKeys keys{int(start), int(smaller(p.keys_per_split, p.tokens - start))};
    Flash<Shape, AllKeys> flash(p, keys, at / p.heads, at % p.heads, shared_memory());
    LF_UNROLL
    for (int m = 0; m < Shape::RowTiles; ++m) {
        LF_UNROLL
        for (int half = 0; half < 2; ++half) flash.reach[m][half] = Reach::of(p, keys, 0, 0);
    }
    flash.run(token_of);
    const int t = lane_index() & 3;
    const int length = text_partial_length(p.value_dim);
    float* partial = reinterpret_cast<float*>(p.partial) + (int64_t(at) * p.splits + split) * p.text * length;
    LF_UNROLL
    for (int m = 0; m < Shape::RowTiles; ++m) {
        LF_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float total = flash.row_total(m, half);
            const int query = token_of.first + flash.query_of(m, half);
            if (query >= p.text) continue;
            float* to = partial + int64_t(query) * length;
            LF_UNROLL
            for (int n = 0; n < Shape::Width / 8; ++n) {
                if (n * 8 >= p.value_dim) break;
                to[n * 8 + 2 * t] = flash.sums[m][n][half * 2];
                to[n * 8 + 2 * t + 1] = flash.sums[m][n][half * 2 + 1];
            }
            if (t == 0) {
                to[p.value_dim] = flash.largest[m][half];
                to[p.value_dim + 1] = total;
            }
        }
    }
}

/// Puts the splits of text queries together, in order. Grid: x = head + B·H * 4 text queries, a warp each.
template <typename T>
LF_DEVICE void window_combine_kernel(const LfWindow& p) {
    const int all_heads = p.batch * p.heads;
    const int at = block_x() % all_heads;
    const int query = block_x() / all_heads * 4 + warp_index();
    if (query >= p.text) return;
    const int length = text_partial_length(p.value_dim);
    const int64_t step = int64_t(p.text) * length;
    const float* from = reinterpret_cast<const float*>(p.partial) + int64_t(at) * p.splits * step + int64_t(query) * length;
    float top = -INFINITY;
    for (int s = 0; s < p.splits; ++s) top = larger(top, from[s * step + p.value_dim]);
    float total = 0.0f;
    for (int s = 0; s < p.splits; ++s)
        total += exp2_fast(from[s * step + p.value_dim] - top) * from[s * step + p.value_dim + 1];
    const Rows<T> out(p.out, at / p.heads, at % p.heads);
    T* to = out.row(p.text_start + query);
    for (int c = lane_index(); c < p.value_dim; c += 32) {
        float sum = 0.0f;
        for (int s = 0; s < p.splits; ++s) sum += exp2_fast(from[s * step + p.value_dim] - top) * from[s * step + c];
        from_float(to[c], sum / total);
    }
}

} // namespace lf
#endif
