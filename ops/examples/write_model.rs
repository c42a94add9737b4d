//! Writes one-node models to try the operator with:
//! `cargo run -p linfusion-ops --example write_model -- FOLDER [OPSET] [HEADS] [D] [DV]`
//! gives `FOLDER/{op,function,standard}-{f32,f16,bf16,f64}-{packed,heads}.onnx`.

#[path = "../tests/support/onnx_bytes.rs"]
mod onnx_bytes;

use std::error::Error;
use std::path::Path;

use linfusion_ops::body::{
    BodySpec, MIN_BF16_OPSET, MIN_FUNCTION_OPSET, linfusion_attention_body,
    linfusion_attention_inline,
};
use linfusion_ops::{ElementType, Layout, LinFusionAttentionAttrs};
use onnx_bytes::{Form, OneNode, Site};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = Path::new(arguments.first().ok_or("which folder?")?);
    let number = |i: usize, default: i64| match arguments.get(i) {
        Some(text) => text.parse::<i64>(),
        None => Ok(default),
    };
    let (opset, heads) = (number(1, 17)?, number(2, 8)?);
    let widths = [
        usize::try_from(number(3, 40)?)?,
        usize::try_from(number(4, number(3, 40)?)?)?,
    ];
    std::fs::create_dir_all(folder)?;
    for layout in [Layout::Packed, Layout::Heads] {
        for element in ElementType::ALL {
            let spec = BodySpec {
                opset,
                layout,
                element,
            };
            let attrs = LinFusionAttentionAttrs::new(heads, None)?;
            let mut forms = vec![("op", Form::Op)];
            if element != ElementType::Bf16 || opset >= MIN_BF16_OPSET {
                let body = linfusion_attention_inline(spec, attrs)?;
                forms.push(("standard", Form::Inlined(body)));
                if opset >= MIN_FUNCTION_OPSET {
                    forms.push(("function", Form::Function(linfusion_attention_body(spec)?)));
                }
            }
            for (name, form) in forms {
                let model = OneNode {
                    opset,
                    layout,
                    element,
                    heads,
                    site: Site::Linear { eps: None },
                    widths,
                    form,
                };
                let element = match element {
                    ElementType::F32 => "f32",
                    ElementType::F16 => "f16",
                    ElementType::Bf16 => "bf16",
                    ElementType::F64 => "f64",
                };
                let layout = format!("{layout:?}").to_lowercase();
                std::fs::write(
                    folder.join(format!("{name}-{element}-{layout}.onnx")),
                    model.encode(),
                )?;
            }
        }
    }
    Ok(())
}
