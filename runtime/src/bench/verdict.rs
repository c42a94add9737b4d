//! Whether two models differ by more than their measurements do.

use serde::Serialize;

use super::median;

/// Runs of each model from which on something can be said of two.
pub const ENOUGH: usize = 5;
/// Runs from which on a turn's two are compared with each other only.
const PAIRED: usize = 8;

/// How a model's time compares with the first one's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Speedup {
    /// The first model's time ÷ this one's: from 8 turns on the median of the turns' ratios, of less the ratio of the
    /// medians.
    pub ratio: f64,
    /// Where the median of the turns' ratios lies with a confidence of 99 %; of fewer turns how far the ratios of
    /// any two runs reach, of fewer than [`ENOUGH`] those of the turns.
    pub range: [f64; 2],
    /// What can be said; `None` of less than [`ENOUGH`] runs.
    pub verdict: Option<Verdict>,
}

/// What can be said of two models at one size. Where nothing but chance orders the runs of two equal ones, anything but
/// [`Verdict::Unclear`] is said in at most 1 % of such comparisons, whatever the distribution of times.
///
/// What a process brings along for all its runs, as where its memory lies, is not chance among them: each model is measured in one
/// process, and a small difference may be that process's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// This one is faster.
    Faster,
    /// It is slower.
    Slower,
    /// The runs do not tell: they vary by more than the models differ.
    Unclear,
}

/// `ratio` is that of the medians; `first` and `this` are the runs, in turns, so that those of one turn can be compared.
///
/// - From [`PAIRED`] turns on, the sign test: of n turns, one model wins each as a coin falls, whatever slows single turns down.
/// - From [`ENOUGH`] on, fewer coins than 1 % takes. One model is faster if its slowest run is faster than the other's fastest:
///   of n runs each, 2 in C(2n, n) orders are such, 2 of 252 for n = 5. That is Mann and Whitney's test (1947) at its smallest
///   level. What slows both runs of a turn down mixes the orders, and makes that rarer.
pub(super) fn speedup(ratio: f64, first: &[f64], this: &[f64]) -> Speedup {
    let turns = first.len().min(this.len());
    let mut ratios: Vec<f64> = match (ENOUGH..PAIRED).contains(&turns) {
        true => first
            .iter()
            .flat_map(|a| this.iter().map(move |b| a / b))
            .collect(),
        false => first.iter().zip(this).map(|(a, b)| a / b).collect(),
    };
    ratios.sort_by(f64::total_cmp);
    let (ratio, left_out) = match turns >= PAIRED {
        true => (median(&ratios).unwrap_or(ratio), outside(turns)),
        false => (ratio, 0),
    };
    let low = ratios.get(left_out).copied().unwrap_or(ratio);
    let high = ratios.iter().rev().nth(left_out).copied().unwrap_or(ratio);
    let verdict = match turns {
        0..ENOUGH => None,
        _ if low > 1.0 => Some(Verdict::Faster),
        _ if high < 1.0 => Some(Verdict::Slower),
        _ => Some(Verdict::Unclear),
    };
    Speedup {
        ratio,
        range: [low, high],
        verdict,
    }
}

/// How many of `n` sorted values are left out at each end of the interval that holds their distribution's median with a
/// probability of at least 99 %: each value lies on either side of it as a coin falls (the sign test).
fn outside(n: usize) -> usize {
    const TAIL: f64 = 0.005;
    let mut log = n as f64 * 0.5_f64.ln();
    let mut tail = 0.0;
    for k in 0..n / 2 {
        tail += log.exp();
        // So few values below the median, with one more left out, would be too likely.
        if tail > TAIL {
            return k.saturating_sub(1);
        }
        log += ((n - k) as f64 / (k + 1) as f64).ln();
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use linfusion_models::random::SplitMix64;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        // The largest k with P(X ≤ k) ≤ 1/200 for X of the binomial distribution of n and 1/2, in exact arithmetic.
        let cases = [
            (8, 0),
            (11, 0),
            (12, 1),
            (13, 1),
            (20, 3),
            (50, 15),
            (100, 36),
            (2000, 941),
        ];
        for (n, left_out) in cases {
            assert_eq!(outside(n), left_out, "{n}");
        }
    }

    #[test]
    fn what_is_within_the_spread_is_unclear() {
        let first = [10.0, 11.0, 10.5, 10.2, 10.8];
        let verdict = |this: &[f64]| speedup(1.0, &first, this).verdict;
        assert_eq!(
            verdict(&[9.9, 11.1, 10.4, 10.1, 10.7]),
            Some(Verdict::Unclear)
        );
        // Faster in every turn, which of five is no proof.
        assert_eq!(
            verdict(&[9.9, 10.9, 10.4, 10.1, 10.7]),
            Some(Verdict::Unclear)
        );
        assert_eq!(verdict(&[9.0, 9.1, 9.2, 9.0, 9.1]), Some(Verdict::Faster));
        assert_eq!(
            verdict(&[11.1, 11.2, 12.0, 11.1, 11.9]),
            Some(Verdict::Slower)
        );
        // The machine was busy in one turn, for both.
        let mut busy = [[10.0; 8], [9.0; 8]];
        (busy[0][3], busy[1][3]) = (90.0, 80.0);
        let busy = speedup(1.0, &busy[0], &busy[1]);
        assert_eq!(busy.verdict, Some(Verdict::Faster));
        let few = speedup(2.0, &[10.0; 4], &[5.0; 4]);
        assert_eq!((few.verdict, few.range), (None, [2.0, 2.0]));
    }

    /// Times of `n` turns: a model that is `ratio` times as fast as the first, on a machine that drifts, slows whole turns
    /// down, and single runs, some of them by much.
    fn measured(random: &mut SplitMix64, n: usize, ratio: f64, turns: f64) -> [Vec<f64>; 2] {
        let mut times = [Vec::new(), Vec::new()];
        let mut drift = 0.0;
        for _ in 0..n {
            drift += 0.3 * turns * random.normal();
            let turn = drift + turns * random.normal();
            for (times, speed) in times.iter_mut().zip([1.0, ratio]) {
                let rare = if random.normal() > 1.5 { 1.0 } else { 0.0 };
                times.push((turn + 0.05 * random.normal() + rare).exp() / speed);
            }
        }
        times
    }

    #[test]
    fn equal_models_are_told_apart_in_one_benchmark_of_a_hundred() {
        const TRIALS: usize = 20_000;
        // Four standard deviations above 1 %.
        let most = 0.01 + 4.0 * (0.01 * 0.99 / TRIALS as f64).sqrt();
        let mut random = SplitMix64::new(1);
        let mut share = |n: usize, ratio: f64, turns: f64| {
            let told = (0..TRIALS).filter(|_| {
                let [first, this] = measured(&mut random, n, ratio, turns);
                let verdict = speedup(1.0, &first, &this).verdict;
                matches!(verdict, Some(Verdict::Faster | Verdict::Slower))
            });
            told.count() as f64 / TRIALS as f64
        };
        for n in [5, 6, 7, 8, 9, 12, 20] {
            for turns in [0.0, 0.02, 0.05, 0.5] {
                let wrong = share(n, 1.0, turns);
                assert!(wrong <= most, "{n} turns, {turns}: {wrong}");
            }
        }
        // The test's own level, where nothing but chance orders the runs: 2 of 252, within four standard deviations.
        let exact = 2.0 / 252.0;
        let spread = 4.0 * (exact / TRIALS as f64).sqrt();
        assert!((share(5, 1.0, 0.0) - exact).abs() < spread);
        // And one that is eight times as fast is seen to be: its rare runs, e times as slow, are faster than any of the first's.
        assert!(share(5, 8.0, 0.02) > 0.99);
    }
}
