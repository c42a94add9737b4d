//! What attention costs, before and after, by counting: floating-point
//! operations and the bytes that must pass between memory and processor.

use serde::Serialize;

/// The shape of one attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Image tokens.
    pub tokens: u64,
    /// Text tokens beside them.
    pub text: u64,
    /// Heads.
    pub heads: u64,
    /// Channels a head.
    pub head_dim: u64,
    /// Width of the two LinFusion MLPs; 0 without.
    pub mid: u64,
    /// Bytes an element.
    pub element: u64,
}

/// Work and traffic for batch 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Floating-point operations (a multiply-add counts two).
    pub flops: f64,
    /// Bytes read and written, if intermediate results of the attention go
    /// through memory once each.
    pub bytes: f64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Cost::default(), |mut sum, c| {
            sum += c;
            sum
        })
    }
}

/// Softmax attention as MatMul, Softmax, MatMul: q·kᵀ and p·v are 2·N²·D each a
/// head; the N×N scores are written, read by Softmax, written and read again.
#[must_use]
pub fn softmax(s: Shape) -> Cost {
    let (n, h, d) = (
        (s.tokens + s.text) as f64,
        s.heads as f64,
        s.head_dim as f64,
    );
    Cost {
        flops: h * (4.0 * n * n * d + 5.0 * n * n),
        bytes: s.element as f64 * h * (4.0 * n * d + 4.0 * n * n),
    }
}

/// LinFusion attention: φ(k)ᵀv and φ(q)·S are 2·N·D² each a head; the MLPs are
/// two pairs of N×C×mid products; q, k, v are read and the output written once.
#[must_use]
pub fn linear(s: Shape) -> Cost {
    let (n, h, d) = (s.tokens as f64, s.heads as f64, s.head_dim as f64);
    let mlp = 8.0 * n * h * d * s.mid as f64;
    Cost {
        flops: h * (4.0 * n * d * d + 6.0 * n * d) + mlp,
        bytes: s.element as f64
            * (4.0 * n * h * d
                + if s.mid > 0 {
                    4.0 * n * (h * d + s.mid as f64)
                } else {
                    0.0
                }),
    }
}

/// Window attention: each image token meets `keys` keys and the text, each text token
/// everything; no scores go through memory.
#[must_use]
pub fn window(s: Shape, keys: u64) -> Cost {
    let (n, p, h, d) = (
        s.tokens as f64,
        s.text as f64,
        s.heads as f64,
        s.head_dim as f64,
    );
    let pairs = n * (keys.min(s.tokens) as f64 + p) + p * (n + p);
    Cost {
        flops: h * pairs * (4.0 * d + 5.0),
        bytes: s.element as f64 * h * 4.0 * (n + p) * d,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_attention_grows_linearly_and_softmax_quadratically() {
        let at = |tokens| Shape {
            tokens,
            text: 0,
            heads: 8,
            head_dim: 40,
            mid: 20,
            element: 2,
        };
        assert_eq!(linear(at(4096)).flops * 4.0, linear(at(16384)).flops);
        assert_eq!(softmax(at(4096)).flops * 16.0, softmax(at(16384)).flops);
        assert_eq!(
            window(at(4096), 256).flops * 4.0,
            window(at(16384), 256).flops
        );
    }
}
