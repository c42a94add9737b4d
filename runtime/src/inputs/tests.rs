//! Shapes and values of inputs that nobody gave.

use super::*;
use crate::tensor::DType;

fn port(name: &str, dtype: DType, dims: &[&str]) -> Port {
    let dim = |text: &&str| match text.parse() {
        Ok(size) => Dim::Fixed(size),
        Err(_) if *text == "?" => Dim::Any,
        Err(_) => Dim::Symbol((*text).to_owned()),
    };
    Port {
        name: name.to_owned(),
        dtype,
        shape: Some(dims.iter().map(dim).collect()),
    }
}

fn shapes(ports: &[Port], request: &Request) -> Result<Vec<Vec<usize>>, InputsError> {
    let inputs = make(ports, request)?;
    Ok(inputs.iter().map(|(_, t)| t.shape().to_vec()).collect())
}

fn at(latent: usize) -> Request {
    Request {
        latent: Some(latent),
        ..Request::default()
    }
}

#[test]
fn dimensions_come_from_names_and_ranks() {
    let sample = |dims| port("sample", DType::F32, dims);
    let text = |dims| port("encoder_hidden_states", DType::F32, dims);
    let step = |dims| port("timestep", DType::I64, dims);
    let cases = [
        (
            "names",
            vec![
                sample(&["batch", "4", "height", "width"]),
                step(&[]),
                text(&["batch", "sequence", "768"]),
            ],
            vec![vec![2, 4, 16, 16], vec![], vec![2, 77, 768]],
        ),
        (
            "lost names",
            vec![
                sample(&["s53", "4", "s1", "s2"]),
                step(&["s9"]),
                text(&["s53", "s7", "768"]),
            ],
            vec![vec![2, 4, 16, 16], vec![1], vec![2, 77, 768]],
        ),
        (
            "a fixed batch rules the open ones",
            vec![
                sample(&["1", "4", "?", "?"]),
                port("text_embeds", DType::F16, &["?", "1280"]),
            ],
            vec![vec![1, 4, 16, 16], vec![1, 1280]],
        ),
        (
            "a packed image",
            vec![
                port("hidden_states", DType::F32, &["s2", "s87", "64"]),
                text(&["s2", "s31", "4096"]),
                port("img_ids", DType::F32, &["s29", "3"]),
                port("txt_ids", DType::F32, &["s2", "s96", "3"]),
            ],
            vec![
                vec![2, 64, 64],
                vec![2, 77, 4096],
                vec![64, 3],
                vec![2, 77, 3],
            ],
        ),
        (
            "a hint in pixels",
            vec![
                sample(&["batch", "4", "height", "width"]),
                port("controlnet_cond", DType::F32, &["batch", "3", "?", "?"]),
            ],
            vec![vec![2, 4, 16, 16], vec![2, 3, 128, 128]],
        ),
    ];
    for (case, ports, expected) in cases {
        assert_eq!(shapes(&ports, &at(16)), Ok(expected), "{case}");
    }
}

#[test]
fn given_shapes_rule_their_symbols() {
    let ports = [
        port("sample", DType::F32, &["b", "4", "h", "h"]),
        port("other", DType::F32, &["b", "h", "?", "?", "?"]),
    ];
    let mut request = at(16);
    let open = shapes(&ports, &request).unwrap_err();
    // Axis 1 shares its symbol with the image.
    assert!(matches!(open, InputsError::Open { axis: 2, .. }), "{open}");
    request.shapes = vec![
        ("sample".to_owned(), vec![3, 4, 8, 8]),
        ("other".to_owned(), vec![3, 8, 1, 1, 1]),
    ];
    let expected = vec![vec![3, 4, 8, 8], vec![3, 8, 1, 1, 1]];
    assert_eq!(shapes(&ports, &request), Ok(expected));
    request.shapes[0].0 = "smaple".to_owned();
    let unknown = shapes(&ports, &request).unwrap_err();
    assert!(unknown.to_string().contains("`smaple`"), "{unknown}");
}

#[test]
fn ids_are_as_many_as_tokens() {
    let ports = [
        port("hidden_states", DType::F32, &["b", "s1", "8"]),
        port("encoder_hidden_states", DType::F32, &["b", "s2", "12"]),
        port("img_ids", DType::F32, &["s3", "3"]),
        port("txt_ids", DType::F32, &["b", "s4", "3"]),
    ];
    let given = |shapes: &[(&str, &[usize])]| {
        let named = |(name, shape): &(&str, &[usize])| ((*name).to_owned(), shape.to_vec());
        let request = Request {
            shapes: shapes.iter().map(named).collect(),
            ..at(16)
        };
        self::shapes(&ports, &request)
    };
    // One says it for both.
    let of = |image, text| {
        vec![
            vec![2, image, 8],
            vec![2, text, 12],
            vec![image, 3],
            vec![2, text, 3],
        ]
    };
    assert_eq!(given(&[]), Ok(of(64, 77)));
    assert_eq!(given(&[("img_ids", &[24, 3])]), Ok(of(24, 77)));
    let text: (&str, &[usize]) = ("encoder_hidden_states", &[2, 5, 12]);
    assert_eq!(given(&[text]), Ok(of(64, 5)));
    let image: (&str, &[usize]) = ("hidden_states", &[2, 24, 8]);
    assert_eq!(given(&[image]), Ok(of(24, 77)));

    // Both are taken as they are: graphs that join tokens inside have ids of their own number. Engines that refuse them are
    // explained.
    let hint = |shapes: &[(&str, &[usize])]| {
        let inputs = ports.iter().zip(given(shapes).unwrap());
        let inputs: Vec<_> = inputs
            .map(|(port, shape)| (port.name.clone(), Tensor::F32(ArrayD::zeros(shape))))
            .collect();
        ids_hint(&ports, &inputs).unwrap_or_default()
    };
    let said = hint(&[image, ("img_ids", &[9, 3])]);
    let expected =
        "`img_ids` [9, 3] has the position ids of 9 tokens, but `hidden_states` [2, 24, 8] has 24 ";
    assert!(said.starts_with(expected), "{said}");
    let said = hint(&[text, ("txt_ids", &[2, 6, 3])]);
    assert!(said.starts_with("`txt_ids` [2, 6, 3]"), "{said}");
    assert_eq!(hint(&[image, text]), "");
}

/// Inputs as others name them, and reference images whose tokens are joined inside the graph.
#[test]
fn packed_images_have_many_names() {
    let ports = [
        port("img", DType::F32, &["b", "n", "64"]),
        port("txt", DType::F32, &["b", "m", "32"]),
        port("img_ids", DType::F32, &["b", "i", "3"]),
        port("txt_ids", DType::F32, &["b", "j", "3"]),
    ];
    let request = Request {
        shapes: vec![
            ("img".to_owned(), vec![1, 24, 64]),
            ("txt".to_owned(), vec![1, 5, 32]),
        ],
        ..Request::default()
    };
    let expected = vec![
        vec![1, 24, 64],
        vec![1, 5, 32],
        vec![1, 24, 3],
        vec![1, 5, 3],
    ];
    assert_eq!(shapes(&ports, &request), Ok(expected));

    let ports = [
        port("hidden_states", DType::F32, &["b", "n", "64"]),
        port("image_latents", DType::F32, &["b", "r", "64"]),
        port("img_ids", DType::F32, &["i", "3"]),
    ];
    let request = Request {
        shapes: vec![
            ("hidden_states".to_owned(), vec![1, 24, 64]),
            ("image_latents".to_owned(), vec![1, 8, 64]),
            ("img_ids".to_owned(), vec![32, 3]),
        ],
        ..Request::default()
    };
    let expected = vec![vec![1, 24, 64], vec![1, 8, 64], vec![32, 3]];
    assert_eq!(shapes(&ports, &request), Ok(expected));
}

/// ONNX Runtime has no dimensions for scalars and for inputs of unknown rank alike.
#[test]
fn a_shape_without_dimensions_takes_any() {
    let ports = [port("x", DType::F32, &[])];
    let request = Request {
        shapes: vec![("x".to_owned(), vec![1, 4, 8, 8])],
        ..Request::default()
    };
    assert_eq!(shapes(&ports, &request), Ok(vec![vec![1, 4, 8, 8]]));
}

#[test]
fn shapes_that_the_graph_does_not_take_are_refused() {
    let ports = [port("sample", DType::F32, &["b", "4", "h", "w"])];
    for wrong in [vec![2, 4], vec![2, 3, 8, 8], vec![]] {
        let request = Request {
            shapes: vec![("sample".to_owned(), wrong.clone())],
            ..Request::default()
        };
        let error = shapes(&ports, &request).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{wrong:?}")) && error.contains("f32[b, 4, h, w]"),
            "{error}"
        );
    }
}

#[test]
fn a_fixed_size_asked_for_another_is_an_error() {
    let ports = [port("sample", DType::F32, &["2", "4", "64", "64"])];
    assert_eq!(shapes(&ports, &at(64)), Ok(vec![vec![2, 4, 64, 64]]));
    let error = shapes(&ports, &at(128)).unwrap_err().to_string();
    assert!(
        error.contains("f32[2, 4, 64, 64]") && error.contains("128"),
        "{error}"
    );
}

#[test]
fn values_are_seeded_typed_and_sensible() {
    let ports = [
        port("sample", DType::F16, &["2", "4", "64", "64"]),
        port("timestep", DType::I64, &[]),
        port("ids", DType::I32, &["1", "7"]),
    ];
    let first = make(&ports, &Request::default()).unwrap();
    assert_eq!(first, make(&ports, &Request::default()).unwrap());
    let other = Request {
        seed: 1,
        ..Request::default()
    };
    assert_ne!(first[0], make(&ports, &other).unwrap()[0]);
    assert_eq!(first[1].1.to_f64().sum(), 500.0);
    let sample = first[0].1.to_f64();
    let mean = sample.mean().unwrap();
    let deviation = sample.std(0.0);
    // Four standard errors of the mean and the deviation of 32,768 normal values.
    assert!(mean.abs() < 0.022 && (deviation - 1.0).abs() < 0.016);
    assert!(first[0].1.is_finite());
}

#[test]
fn ids_are_a_raster_of_the_packed_image() {
    let ports = [
        port("img_ids", DType::F32, &["6", "3"]),
        port("txt_ids", DType::F32, &["2", "3"]),
    ];
    let inputs = make(&ports, &Request::default()).unwrap();
    let values: Vec<Vec<f64>> = inputs
        .iter()
        .map(|(_, tensor)| tensor.to_f64().into_iter().collect())
        .collect();
    // Two rows of three.
    let raster = [
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0],
        [0.0, 0.0, 2.0],
        [0.0, 1.0, 0.0],
        [0.0, 1.0, 1.0],
        [0.0, 1.0, 2.0],
    ];
    assert_eq!(values, [raster.concat(), vec![0.0; 6]]);
    // No size is beyond being refused.
    let asked = usize::MAX;
    let refused = make(&ports, &at(asked)).unwrap_err();
    assert!(matches!(refused, InputsError::FixedSize { asked: a, .. } if a == asked));
}

#[test]
fn an_impossible_size_is_an_error() {
    let ports = [port("sample", DType::F32, &["?", "4", "?", "?"])];
    let error = shapes(&ports, &at(usize::MAX)).unwrap_err();
    assert!(matches!(error, InputsError::TooLarge { .. }), "{error}");
}
