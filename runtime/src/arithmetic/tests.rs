//! The same operations on the host and in graphs of ONNX Runtime, on the device that tests run on.

use half::{bf16, f16};
use ndarray::{Array4, ArrayD};

use super::*;
use crate::engine::load_library;
use crate::test_device::device;

/// Both, or the host alone where there is no library.
fn all() -> Vec<Box<dyn Arithmetic>> {
    let mut all: Vec<Box<dyn Arithmetic>> = vec![Box::new(Host)];
    let options = SessionOptions {
        device: device(),
        ..SessionOptions::default()
    };
    match load_library(None) {
        Ok(_) => all.push(Box::new(Graphs::new(&options))),
        Err(_) => println!("skipped: no ONNX Runtime library"),
    }
    all
}

const FLOATS: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// [2, 3, 4, 5], in halves and quarters, which all types have.
fn values(dtype: DType) -> Tensor {
    let array = Array4::from_shape_fn((2, 3, 4, 5), |(a, b, c, d)| {
        (a * 7 + b * 5 + c * 3 + d) as f64 / 4.0 - 5.0
    });
    Tensor::from_f64(array.into_dyn(), dtype)
}

fn columns_first(tensor: &ArrayD<f64>) -> Tensor {
    let mut other = ArrayD::zeros(ndarray::ShapeBuilder::f(tensor.raw_dim()));
    other.assign(tensor);
    Tensor::F64(other)
}

/// A value is in the memory that the arithmetic is for.
fn assert_stays(value: &Value, arithmetic: &dyn Arithmetic) {
    let on_host = arithmetic.location() == Location::Host;
    assert_eq!(value.host().is_some(), on_host);
    assert_eq!(value.device(), if on_host { Device::Cpu } else { device() });
}

#[test]
fn what_goes_up_comes_down_the_same() {
    for mut arithmetic in all() {
        let others = [DType::I64, DType::I32, DType::U8, DType::I8, DType::Bool];
        for dtype in FLOATS.into_iter().chain(others) {
            let tensor = values(dtype);
            let value = arithmetic.upload(tensor.clone()).unwrap();
            assert_eq!((value.dtype(), value.shape()), (dtype, tensor.shape()));
            assert_stays(&value, arithmetic.as_ref());
            assert_eq!(arithmetic.download(&value).unwrap(), tensor);
        }
        let rows = values(DType::F64);
        let value = arithmetic.upload(columns_first(&rows.to_f64())).unwrap();
        assert_eq!(arithmetic.download(&value).unwrap(), rows);
        let scalar = Tensor::from(ndarray::arr0(2.5_f32));
        let value = arithmetic.upload(scalar.clone()).unwrap();
        assert_eq!(arithmetic.download(&value).unwrap(), scalar);
    }
}

#[test]
fn sums_take_any_type_and_give_the_one_asked_for() {
    for mut arithmetic in all() {
        for from in FLOATS {
            let half = arithmetic.upload(values(from)).unwrap();
            let single = arithmetic.upload(values(DType::F32)).unwrap();
            let x = values(DType::F64).to_f64();
            for to in FLOATS {
                // Exact in all types: quarters up to 11.
                let form = Form {
                    bound: Some(4.0),
                    dtype: to,
                };
                let sum = arithmetic.sum(&[(-1.5, &half), (0.5, &single)], form);
                let sum = sum.unwrap();
                assert_stays(&sum, arithmetic.as_ref());
                let sum = arithmetic.download(&sum).unwrap();
                assert_eq!(sum.dtype(), to);
                assert_eq!(
                    sum.to_f64(),
                    x.mapv(|v| (-v).clamp(-4.0, 4.0)),
                    "{from} {to}"
                );
                let cast = arithmetic.sum(&[(1.0, &half)], Form::of(to)).unwrap();
                assert_eq!(
                    arithmetic.download(&cast).unwrap(),
                    values(to),
                    "{from} {to}"
                );
            }
        }
        let integers = arithmetic.upload(values(DType::I64)).unwrap();
        let refused = [
            arithmetic.sum(&[], Form::of(DType::F32)),
            arithmetic.sum(&[(1.0, &integers)], Form::of(DType::F32)),
        ];
        for error in refused {
            assert!(error.is_err());
        }
        let all = arithmetic.upload(values(DType::F32)).unwrap();
        let part = arithmetic.part(&all, 1, 0..1).unwrap();
        let error = arithmetic.sum(&[(1.0, &all), (1.0, &part)], Form::of(DType::F32));
        let error = error.err().unwrap().to_string();
        assert_eq!(error, "cannot add f32[2, 3, 4, 5], f32[2, 1, 4, 5]");
        assert!(
            arithmetic
                .sum(&[(1.0, &all)], Form::of(DType::I64))
                .is_err()
        );
    }
}

#[test]
fn parts_joined_are_the_whole() {
    for mut arithmetic in all() {
        for dtype in FLOATS {
            let whole = arithmetic.upload(values(dtype)).unwrap();
            for axis in 0..4 {
                let length = whole.shape()[axis];
                let first = arithmetic.part(&whole, axis, 0..1).unwrap();
                let rest = arithmetic.part(&whole, axis, 1..length).unwrap();
                assert_eq!(rest.shape()[axis], length - 1);
                let joined = arithmetic.join(axis, &[&first, &rest]).unwrap();
                for value in [&first, &rest, &joined] {
                    assert_stays(value, arithmetic.as_ref());
                }
                assert_eq!(
                    arithmetic.download(&joined).unwrap(),
                    values(dtype),
                    "{dtype}"
                );
                let swapped = arithmetic.join(axis, &[&rest, &first]).unwrap();
                assert_ne!(arithmetic.download(&swapped).unwrap(), values(dtype));
                assert!(arithmetic.part(&whole, axis, 1..length + 1).is_err());
            }
            assert!(arithmetic.part(&whole, 4, 0..1).is_err());
            let other = arithmetic.upload(values(DType::I32)).unwrap();
            assert!(arithmetic.join(0, &[&whole, &other]).is_err());
            let narrow = arithmetic.part(&whole, 2, 0..1).unwrap();
            assert!(arithmetic.join(1, &[&whole, &narrow]).is_err());
            assert!(arithmetic.join(4, &[&whole, &whole]).is_err());
            assert!(arithmetic.join(0, &[]).is_err());
        }
    }
}

#[test]
fn one_value_that_is_not_finite_is_found() {
    for mut arithmetic in all() {
        let integers = arithmetic.upload(values(DType::I64)).unwrap();
        for dtype in FLOATS {
            let sound = arithmetic.upload(values(dtype)).unwrap();
            assert!(arithmetic.finite(&[&sound, &integers]).unwrap(), "{dtype}");
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let mut array = values(DType::F64).to_f64();
                array[[1, 2, 3, 4]] = bad;
                let tensor = Tensor::from_f64(array, dtype);
                let value = arithmetic.upload(tensor).unwrap();
                let found = arithmetic.finite(&[&sound, &integers, &value]).unwrap();
                assert!(!found, "{dtype} {bad}");
            }
        }
        // The largest numbers are finite, and so is every sum of their products with 0.
        let largest = [
            Tensor::from(ndarray::arr1(&[f32::MAX, f32::MAX, f32::MIN])),
            Tensor::from(ndarray::arr1(&[f16::MAX, f16::MAX, f16::MIN])),
            Tensor::from(ndarray::arr1(&[bf16::MAX, bf16::MAX, bf16::MIN])),
        ];
        for tensor in largest {
            let value = arithmetic.upload(tensor).unwrap();
            assert!(arithmetic.finite(&[&value]).unwrap());
        }
        assert!(arithmetic.finite(&[&integers]).unwrap());
    }
}

#[test]
fn tensors_stay_on_a_gpu_unless_told_otherwise() {
    let at = |engine, device, shared| {
        location(
            engine,
            &SessionOptions {
                device,
                shared,
                ..SessionOptions::default()
            },
        )
    };
    let (host, device) = (Location::Host, Location::Device);
    assert_eq!(at(Engine::Ort, Device::Cpu, None), host);
    assert_eq!(at(Engine::Ort, Device::Cuda(1), None), device);
    assert_eq!(at(Engine::Ort, Device::Cpu, Some(device)), device);
    assert_eq!(at(Engine::Ort, Device::Cuda(0), Some(host)), host);
    assert_eq!(at(Engine::Tract, Device::Cpu, Some(device)), host);
}
