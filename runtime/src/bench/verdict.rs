//! Whether two models differ by more than their measurements do.

use serde::Serialize;

/// How a model's time compares with the first one's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Speedup {
    /// Median time of the first model ÷ median time of this one.
    pub ratio: f64,
    /// Where the true median ratio lies with a confidence of 15/16 or more (of runs that are too few, as far as they reach).
    pub range: [f64; 2],
    /// What can be said; `None` after one run, which tells nothing of the spread.
    pub verdict: Option<Verdict>,
}

/// What can be said of two models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// This one is faster.
    Faster,
    /// It is slower.
    Slower,
    /// The ratio is within the spread of the runs.
    Equal,
}

/// `ratio` is that of the medians; `first` and `this` are the runs, in turns, so that those of one turn can be compared.
pub(super) fn speedup(ratio: f64, first: &[f64], this: &[f64]) -> Speedup {
    let mut ratios: Vec<f64> = first.iter().zip(this).map(|(a, b)| a / b).collect();
    ratios.sort_by(f64::total_cmp);
    let left_out = outside(ratios.len());
    let low = ratios.get(left_out).copied().unwrap_or(ratio);
    let high = ratios.iter().rev().nth(left_out).copied().unwrap_or(ratio);
    let verdict = match ratios.len() {
        0 | 1 => None,
        _ if low > 1.0 => Some(Verdict::Faster),
        _ if high < 1.0 => Some(Verdict::Slower),
        _ => Some(Verdict::Equal),
    };
    Speedup {
        ratio,
        range: [low, high],
        verdict,
    }
}

/// How many of `n` sorted values are left out at each end of the interval that holds their distribution's median with a
/// probability of at least 15/16: each value lies on either side of it as a coin falls (the sign test).
fn outside(n: usize) -> usize {
    const TAIL: f64 = 1.0 / 32.0;
    let mut log = n as f64 * 0.5_f64.ln();
    let mut tail = 0.0;
    for k in 0..n / 2 {
        tail += log.exp();
        // So few values below the median, with one more left out, would be too likely.
        if tail > TAIL * (1.0 + f64::EPSILON * n as f64) {
            return k.saturating_sub(1);
        }
        log += ((n - k) as f64 / (k + 1) as f64).ln();
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        // The largest k with P(X ≤ k) ≤ 1/32 for X of the binomial distribution of n and 1/2, in exact arithmetic.
        let cases = [
            (1, 0),
            (2, 0),
            (5, 0),
            (8, 0),
            (9, 1),
            (20, 5),
            (50, 17),
            (2000, 957),
        ];
        for (n, left_out) in cases {
            assert_eq!(outside(n), left_out, "{n}");
        }
    }

    #[test]
    fn what_is_within_the_spread_is_equal() {
        let first = [10.0, 11.0, 10.5, 10.2, 10.8];
        let verdict = |this: &[f64]| speedup(1.0, &first, this).verdict;
        assert_eq!(
            verdict(&[9.9, 11.1, 10.4, 10.1, 10.7]),
            Some(Verdict::Equal)
        );
        assert_eq!(verdict(&[9.0, 9.1, 9.2, 9.0, 9.1]), Some(Verdict::Faster));
        assert_eq!(
            verdict(&[11.1, 11.2, 12.0, 11.0, 11.9]),
            Some(Verdict::Slower)
        );
        // The machine was busy in one turn, for both.
        let busy = speedup(1.0, &[10.0, 90.0, 10.0], &[9.0, 80.0, 9.0]);
        assert_eq!(busy.verdict, Some(Verdict::Faster));
        let once = speedup(2.0, &[10.0], &[5.0]);
        assert_eq!((once.verdict, once.range), (None, [2.0, 2.0]));
    }
}
