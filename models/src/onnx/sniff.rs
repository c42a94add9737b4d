//! Names what a file that is not ONNX looks like.

/// How many bytes at the start of a file [`looks_like`] wants to see.
pub(super) const SNIFF_BYTES: usize = 4096;

/// What the file looks like, with a hint, from its first bytes; `None` if nothing
/// is recognised. Only asked after the file failed to read as a model.
pub(super) fn looks_like(head: &[u8]) -> Option<&'static str> {
    let text = head.trim_ascii_start();
    let starts = |magic: &[u8]| head.starts_with(magic);
    let at = |offset: usize, magic: &[u8]| {
        head.get(offset..)
            .is_some_and(|rest| rest.starts_with(magic))
    };
    Some(if head.is_empty() {
        "an empty file"
    } else if starts(b"version https://git-lfs") {
        "a Git LFS pointer, not the file itself: run `git lfs pull`"
    } else if starts(&[0x1f, 0x8b]) {
        "gzip: unpack it first"
    } else if starts(&[0x28, 0xb5, 0x2f, 0xfd]) {
        "zstd: unpack it first"
    } else if starts(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        "xz: unpack it first"
    } else if starts(b"7z\xbc\xaf\x27\x1c") {
        "a 7-Zip archive: unpack it first"
    } else if starts(b"PK\x03\x04") {
        zip_kind(head)
    } else if is_safetensors(head) {
        "safetensors: that is weights without a graph; export the model to ONNX first"
    } else if starts(b"GGUF") {
        "GGUF: that is weights without a graph; export the model to ONNX first"
    } else if head.first() == Some(&0x80)
        && matches!(head.get(1), Some(2..=5))
        && matches!(head.get(2), Some(0x8a | 0x95 | b'}' | b'c' | b'K' | b'q'))
    {
        "a Python pickle (an old PyTorch checkpoint?): export the model to ONNX first"
    } else if starts(b"\x89HDF\r\n") {
        "HDF5 (a Keras model?)"
    } else if starts(b"\x93NUMPY") {
        "a NumPy array"
    } else if at(4, b"ORTM") {
        "ONNX Runtime's own .ort format: use the .onnx file that it was made from"
    } else if at(4, b"TFL3") {
        "TensorFlow Lite"
    } else if starts(b"ftrt") {
        "a TensorRT engine: use the .onnx file that it was made from"
    } else if has_prefix_ignoring_case(text, b"<!doctype html")
        || has_prefix_ignoring_case(text, b"<html")
    {
        "a web page (a download that needed a login?)"
    } else if text.starts_with(b"<?xml") {
        "XML (OpenVINO's IR?)"
    } else if text.starts_with(b"<") && contains(text, b"ir_version") {
        "ONNX in its textual form: only the binary form is read"
    } else if text.starts_with(b"{") || text.starts_with(b"[") {
        "JSON"
    } else if head.len() >= 16 && head.iter().all(|b| *b == 0) {
        "all zeros at its start: a download that was not finished?"
    } else if head.len() >= 4 && is_text(head) {
        "a text file"
    } else {
        return None;
    })
}

fn zip_kind(head: &[u8]) -> &'static str {
    if contains(head, b"data.pkl") {
        "a PyTorch checkpoint (zip): export the model to ONNX first"
    } else if contains(head, b".npy") {
        "a NumPy .npz archive"
    } else {
        "a zip archive: unpack it first"
    }
}

fn is_safetensors(head: &[u8]) -> bool {
    let Some((length, rest)) = head.split_first_chunk::<8>() else {
        return false;
    };
    // The header is JSON; 100 MB is the limit of the format's own reader.
    u64::from_le_bytes(*length) <= 100_000_000 && rest.starts_with(b"{\"")
}

/// Whether there are no control characters but white space: protobuf has some in its first bytes.
fn is_text(head: &[u8]) -> bool {
    let cut = match std::str::from_utf8(head) {
        Err(e) if e.error_len().is_some() => return false,
        Err(e) => e.valid_up_to(),
        Ok(text) => text.len(),
    };
    let control = |b: &u8| b.is_ascii_control() && !b.is_ascii_whitespace();
    !head.iter().take(cut).any(control)
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

fn has_prefix_ignoring_case(text: &[u8], prefix: &[u8]) -> bool {
    text.get(..prefix.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

#[cfg(test)]
mod tests {
    use super::looks_like;

    #[test]
    fn known_strangers_are_named() {
        let mut safetensors = 64_u64.to_le_bytes().to_vec();
        safetensors.extend_from_slice(b"{\"__metadata__\":{}}");
        let cases: [(&[u8], &str); 15] = [
            (b"", "empty"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
                "LFS",
            ),
            (&[0x1f, 0x8b, 8, 0], "gzip"),
            (b"PK\x03\x04....archive/data.pkl", "PyTorch"),
            (b"PK\x03\x04....weight.npy", "NumPy"),
            (b"PK\x03\x04....readme.txt", "zip"),
            (&safetensors, "safetensors"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (&[0x80, 2, 0x8a, 10], "pickle"),
            (b"\x20\0\0\0ORTM", ".ort"),
            (b"\n<!DOCTYPE HTML><html>", "web page"),
            (b"<\n  ir_version: 8\n>", "textual"),
            (b" {\"a\": 1}", "JSON"),
            (&[0; 64], "zeros"),
            (b"# A model\n\nIt is.\n", "text file"),
        ];
        for (head, word) in cases {
            let said = looks_like(head).unwrap_or_default();
            assert!(said.contains(word), "{head:?}: {said}");
        }
    }

    #[test]
    fn a_model_is_not_named() {
        // ir_version = 8, producer_name = "pytorch"
        assert_eq!(looks_like(b"\x08\x08\x12\x07pytorch"), None);
        assert_eq!(looks_like(b"\x08"), None);
    }
}
