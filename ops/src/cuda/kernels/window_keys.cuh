// WindowAttention: which keys a query attends to.
#pragma once
#include "numbers.cuh"

namespace lf {

/// Some consecutive rows or columns of the image.
struct Range {
    int start, length;
};

/// The rows (columns) of the window of the query in row (column) `at` of `size`: `WindowAttentionAttrs::key_range`.
LF_DEVICE Range window_range(int at, int size, int window, bool clamp) {
    if (clamp) {
        window = smaller(window, size);
        const int start = smaller(larger(at - window / 2, 0), size - window);
        return Range{start, window};
    }
    const int first = at - window / 2;
    const int start = larger(first, 0);
    return Range{start, smaller(first + window, size) - start};
}

/// A key of a block's list: its token, and its row and column counted from the first of the list's image keys.
struct Key {
    int token, row, column;
};
/// Rows of keys that every query attends to, and of none.
constexpr int EVERY_QUERY = -1;
constexpr int NO_QUERY = -2;

/// The keys that the image queries of a tile attend to: a rectangle of the image, row by row, then all text.
struct ImageKeys {
    Range rows, columns;
    int image_start, text_start, image_columns, text;

    /// Of the windows of the queries in rows y0..y1 and columns x0..x1, both inclusive.
    LF_DEVICE ImageKeys(const LfWindow& p, int y0, int y1, int x0, int x1)
        : rows(hull(y0, y1, p.rows, p.window_rows, p.clamp)), columns(hull(x0, x1, p.cols, p.window_cols, p.clamp)),
          image_start(int(p.image_start)), text_start(int(p.text_start)), image_columns(p.cols), text(p.text) {}

    LF_DEVICE static Range hull(int first, int last, int size, int window, bool clamp) {
        const Range a = window_range(first, size, window, clamp), b = window_range(last, size, window, clamp);
        return Range{a.start, b.start + b.length - a.start};
    }

    LF_DEVICE int count() const { return rows.length * columns.length + text; }

    LF_DEVICE Key at(int i) const {
        const int in_image = rows.length * columns.length;
        if (i < in_image) {
            const int row = i / columns.length, column = i - row * columns.length;
            return Key{image_start + (rows.start + row) * image_columns + columns.start + column, row, column};
        }
        if (i < in_image + text) return Key{text_start + i - in_image, EVERY_QUERY, 0};
        return Key{0, NO_QUERY, 0};
    }
};

/// Some consecutive tokens, for queries that attend to everything.
struct AllKeys {
    int start, length;

    LF_DEVICE int count() const { return length; }
    LF_DEVICE Key at(int i) const {
        if (i < length) return Key{start + i, EVERY_QUERY, 0};
        return Key{0, NO_QUERY, 0};
    }
};

/// Which keys of a list one query attends to.
struct Reach {
    Range rows, columns;
    /// The query itself, in the list's rows and columns.
    int row, column;
    /// Square of the radius; 0: no circle.
    int radius_squared;

    /// Of the query at (y, x).
    LF_DEVICE static Reach of(const LfWindow& p, const ImageKeys& keys, int y, int x) {
        Reach reach;
        reach.rows = window_range(y, p.rows, p.window_rows, p.clamp);
        reach.columns = window_range(x, p.cols, p.window_cols, p.clamp);
        reach.rows.start -= keys.rows.start;
        reach.columns.start -= keys.columns.start;
        reach.row = y - keys.rows.start;
        reach.column = x - keys.columns.start;
        reach.radius_squared = int(p.radius_squared);
        return reach;
    }

    LF_DEVICE static Reach of(const LfWindow&, const AllKeys&, int, int) {
        return Reach{Range{0, 0}, Range{0, 0}, 0, 0, 0};
    }

    LF_DEVICE bool has(int key_row, int key_column) const {
        const bool inside = unsigned(key_row - rows.start) < unsigned(rows.length) &&
                            unsigned(key_column - columns.start) < unsigned(columns.length);
        if (radius_squared != 0 && inside) {
            const int dy = key_row - row, dx = key_column - column;
            return dy * dy + dx * dx < radius_squared;
        }
        return inside || key_row == EVERY_QUERY;
    }
};

} // namespace lf
