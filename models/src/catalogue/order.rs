//! The order in which a diffusion model runs its modules, from their names alone.

use std::borrow::Cow;
use std::cmp::Ordering;

/// Indices of `modules` in the order in which the model runs them: down blocks, the middle block, up
/// blocks, each by natural number order (`2` before `10`). Names of equal rank keep their order.
///
/// PyTorch's own order of `named_modules()`, which checkpoints follow, has the middle block last.
pub fn execution_order<S: AsRef<str>>(modules: &[S]) -> Vec<usize> {
    let canonical: Vec<_> = modules
        .iter()
        .map(|m| canonical_module(m.as_ref()))
        .collect();
    let mut order: Vec<usize> = (0..modules.len()).collect();
    order.sort_by(|a, b| match (canonical.get(*a), canonical.get(*b)) {
        (Some(a), Some(b)) => compare(a, b),
        _ => Ordering::Equal,
    });
    order
}

/// The module path as diffusers spells it: without a wrapper's prefix (`unet.`, `model.diffusion_model.`),
/// and with the original latent-diffusion names (`input_blocks.4.1.…`) translated.
pub fn canonical_module(module: &str) -> Cow<'_, str> {
    const ROOTS: [&str; 6] = [
        "down_blocks",
        "mid_block",
        "up_blocks",
        "input_blocks",
        "middle_block",
        "output_blocks",
    ];
    let parts: Vec<&str> = module.split('.').collect();
    let Some(start) = parts.iter().position(|part| ROOTS.contains(part)) else {
        return Cow::Borrowed(module);
    };
    let parts = parts.get(start..).unwrap_or_default();
    match original_block(parts) {
        Some((block, rest)) => Cow::Owned(format!("{block}.{}", rest.join("."))),
        None if start == 0 => Cow::Borrowed(module),
        None => Cow::Owned(parts.join(".")),
    }
}

/// The original code numbers its blocks flat: three entries a level, of which the encoder's first is the
/// input convolution and every third a down-sampler. Entry `.1` is the transformer.
fn original_block<'a, 'b>(parts: &'a [&'b str]) -> Option<(String, &'a [&'b str])> {
    match parts {
        ["input_blocks", flat, "1", rest @ ..] => {
            let flat = flat.parse::<usize>().ok()?.checked_sub(1)?;
            let (block, transformer) = (flat / 3, flat % 3);
            Some((
                format!("down_blocks.{block}.attentions.{transformer}"),
                rest,
            ))
        }
        ["middle_block", "1", rest @ ..] => Some(("mid_block.attentions.0".to_owned(), rest)),
        ["output_blocks", flat, "1", rest @ ..] => {
            let flat = flat.parse::<usize>().ok()?;
            let (block, transformer) = (flat / 3, flat % 3);
            Some((format!("up_blocks.{block}.attentions.{transformer}"), rest))
        }
        _ => None,
    }
}

fn compare(a: &str, b: &str) -> Ordering {
    let mut left = a.split('.');
    let mut right = b.split('.');
    loop {
        let ordering = match (left.next(), right.next()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => Ordering::Less,
            (Some(_), None) => Ordering::Greater,
            (Some(a), Some(b)) => compare_part(a, b),
        };
        if ordering != Ordering::Equal {
            return ordering;
        }
    }
}

fn compare_part(a: &str, b: &str) -> Ordering {
    match (a.parse::<u64>(), b.parse::<u64>()) {
        (Ok(a), Ok(b)) => a.cmp(&b),
        _ => stage(a).cmp(&stage(b)).then_with(|| a.cmp(b)),
    }
}

/// Containers whose alphabetical order is not their execution order.
fn stage(part: &str) -> u8 {
    match part {
        "down_blocks" => 0,
        "mid_block" => 1,
        "up_blocks" => 2,
        // FLUX runs its double-stream blocks before the single-stream ones.
        "transformer_blocks" => 3,
        "single_transformer_blocks" => 4,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(modules: &[&str]) -> Vec<String> {
        execution_order(modules)
            .into_iter()
            .map(|i| modules[i].to_owned())
            .collect()
    }

    #[test]
    fn the_middle_block_runs_between_down_and_up() {
        let registered = [
            "down_blocks.1.attentions.0.transformer_blocks.10.attn1",
            "down_blocks.1.attentions.0.transformer_blocks.2.attn1",
            "up_blocks.0.attentions.0.transformer_blocks.0.attn1",
            "mid_block.attentions.0.transformer_blocks.0.attn1",
        ];
        let expected = [registered[1], registered[0], registered[3], registered[2]];
        assert_eq!(sorted(&registered), expected);
    }

    #[test]
    fn transformers_go_by_number() {
        assert_eq!(
            sorted(&["blocks.10.attn", "blocks.9.attn"]),
            ["blocks.9.attn", "blocks.10.attn"]
        );
        assert_eq!(
            sorted(&[
                "single_transformer_blocks.0.attn",
                "transformer_blocks.11.attn",
                "transformer_blocks.3.attn",
            ]),
            [
                "transformer_blocks.3.attn",
                "transformer_blocks.11.attn",
                "single_transformer_blocks.0.attn",
            ]
        );
    }

    #[test]
    fn other_spellings_become_diffusers_names() {
        let cases = [
            ("unet.mid_block.attentions.0", "mid_block.attentions.0"),
            (
                "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1",
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
            ),
            (
                "input_blocks.8.1.transformer_blocks.0.attn1",
                "down_blocks.2.attentions.1.transformer_blocks.0.attn1",
            ),
            (
                "middle_block.1.transformer_blocks.0.attn1",
                "mid_block.attentions.0.transformer_blocks.0.attn1",
            ),
            (
                "output_blocks.11.1.transformer_blocks.0.attn1",
                "up_blocks.3.attentions.2.transformer_blocks.0.attn1",
            ),
            // The input convolution holds no transformer.
            ("input_blocks.0.1.x", "input_blocks.0.1.x"),
            ("blocks.3.attn", "blocks.3.attn"),
            ("", ""),
        ];
        for (from, to) in cases {
            assert_eq!(canonical_module(from), to);
        }
    }
}
