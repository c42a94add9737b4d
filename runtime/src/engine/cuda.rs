//! What ONNX Runtime's CUDA provider is told, in its own words
//! (<https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html>).

use ort::ep::{ArbitrarilyConfigurableExecutionProvider, CUDA};

/// The provider on the GPU of that number, which may take so many bytes of its memory.
pub(super) fn provider(number: u32, limit: Option<usize>) -> CUDA {
    options(number, limit)
        .into_iter()
        .fold(CUDA::default(), |provider, (key, value)| {
            provider.with_arbitrary_config(key, value)
        })
}

fn options(number: u32, limit: Option<usize>) -> Vec<(&'static str, String)> {
    let mut options = vec![
        ("device_id", number.to_string()),
        // The default takes the next power of two, up to twice of what is needed, and the largest stages need half of a GPU.
        ("arena_extend_strategy", "kSameAsRequested".to_owned()),
        // The default, TF32, rounds to 11 bits what convolutions and products of matrices take: other images than the
        // processor's. Known from ONNX Runtime 1.18 on.
        ("use_tf32", "0".to_owned()),
    ];
    options.extend(limit.map(|bytes| ("gpu_mem_limit", bytes.to_string())));
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arena_is_limited_and_products_are_whole() {
        let told = |number, limit| {
            options(number, limit)
                .into_iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(
            told(1, Some(3 << 30)),
            "device_id=1 arena_extend_strategy=kSameAsRequested use_tf32=0 gpu_mem_limit=3221225472"
        );
        assert_eq!(
            told(0, None),
            "device_id=0 arena_extend_strategy=kSameAsRequested use_tf32=0"
        );
    }
}
