//! Einsum of one or two operands.

use candle_core::{Result, Tensor};
use linfusion_models::shapes::einsum_terms;

/// The index letters of each operand and of the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Einsum {
    terms: Vec<Vec<char>>,
    out: Vec<char>,
}

impl Einsum {
    /// Reads an equation; `None` for one with an ellipsis, more than two operands or a letter twice in a term.
    pub fn parse(equation: &str) -> Option<Self> {
        let (terms, out) = einsum_terms(equation)?;
        let once = |term: &Vec<char>| term.iter().enumerate().all(|(i, c)| !term[..i].contains(c));
        let fits = (1..=2).contains(&terms.len()) && terms.iter().chain([&out]).all(once);
        let known = out.iter().all(|c| terms.iter().any(|t| t.contains(c)));
        (fits && known).then_some(Self { terms, out })
    }

    /// Computes it.
    pub fn apply(&self, operands: &[&Tensor]) -> Result<Tensor> {
        match (self.terms.as_slice(), operands) {
            ([term], [x]) => {
                let (x, term) = self.summed(x, term, &[])?;
                turned(&x, &term, &self.out)
            }
            ([left, right], [a, b]) => self.product(left, right, a, b),
            _ => candle_core::bail!("{} operands for {self:?}", operands.len()),
        }
    }

    fn product(&self, left: &[char], right: &[char], a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (a, left) = self.summed(a, left, right)?;
        let (b, right) = self.summed(b, right, &left)?;
        let both = |c: &char| left.contains(c) && right.contains(c);
        let pick = |term: &[char], wanted: &dyn Fn(&char) -> bool| -> Vec<char> {
            term.iter().copied().filter(|c| wanted(c)).collect()
        };
        let batch = pick(&left, &|c| both(c) && self.out.contains(c));
        let inner = pick(&left, &|c| both(c) && !self.out.contains(c));
        let rows = pick(&left, &|c| !both(c));
        let cols = pick(&right, &|c| !both(c));
        let size = |c: &char| -> usize {
            let at = |term: &[char], x: &Tensor| {
                let axis = term.iter().position(|t| t == c)?;
                x.dims().get(axis).copied()
            };
            at(&left, &a).or(at(&right, &b)).unwrap_or(1)
        };
        let count = |letters: &[char]| letters.iter().map(size).product::<usize>();
        let order = |parts: [&[char]; 3]| parts.concat();
        let [nb, ni, nr, nc] = [&batch, &inner, &rows, &cols].map(|l| count(l));
        let a = turned(&a, &left, &order([&batch, &rows, &inner]))?.reshape((nb, nr, ni))?;
        let b = turned(&b, &right, &order([&batch, &inner, &cols]))?.reshape((nb, ni, nc))?;
        let made = order([&batch, &rows, &cols]);
        let sizes: Vec<usize> = made.iter().map(size).collect();
        let product = a.contiguous()?.matmul(&b.contiguous()?)?.reshape(sizes)?;
        turned(&product, &made, &self.out)
    }

    /// Sums over letters that neither the result nor the other operand has.
    fn summed(&self, x: &Tensor, term: &[char], other: &[char]) -> Result<(Tensor, Vec<char>)> {
        let stays = |c: &char| self.out.contains(c) || other.contains(c);
        let gone: Vec<usize> = (0..term.len()).filter(|i| !stays(&term[*i])).collect();
        let left = term.iter().copied().filter(|c| stays(c)).collect();
        match gone.is_empty() {
            true => Ok((x.clone(), left)),
            false => Ok((x.sum(gone)?, left)),
        }
    }
}

fn turned(x: &Tensor, from: &[char], to: &[char]) -> Result<Tensor> {
    let axes: Vec<usize> = to
        .iter()
        .filter_map(|c| from.iter().position(|f| f == c))
        .collect();
    x.permute(axes)
}
