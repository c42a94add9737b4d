"""Checks model repositories for Triton Inference Server without the server.

usage: check_triton.py REPOSITORY [--operators FILE] [--client PROGRAM ARGUMENTS...]

Each config.pbtxt is parsed with the schema that Triton's own client carries (unknown fields and values are errors), and held
against its model as Triton's ONNX Runtime backend does before it serves it: names, types, dimensions. With a client,
the repository is served on a loopback port as Triton would, and `PROGRAM ARGUMENTS --server HOST:PORT` runs against it.
`--operators` is the library that the configurations name by its path on the server. Prints what it found as JSON.
"""

import argparse
import json
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema
from tritonclient.grpc import service_pb2, service_pb2_grpc

ort.set_default_logger_severity(4)

TYPES = {
    "TYPE_BOOL": ("tensor(bool)", np.bool_),
    "TYPE_INT32": ("tensor(int32)", np.int32),
    "TYPE_INT64": ("tensor(int64)", np.int64),
    "TYPE_FP16": ("tensor(float16)", np.float16),
    "TYPE_FP32": ("tensor(float)", np.float32),
    "TYPE_FP64": ("tensor(double)", np.float64),
}


class Fault(Exception):
    pass


def demand(holds, message):
    if not holds:
        raise Fault(message)


def type_name(port):
    return schema.DataType.Name(port.data_type)


def served_shape(config, port):
    """The shape that clients send, as the server's metadata has it."""
    return ([-1] if config.max_batch_size > 0 else []) + list(port.dims)


def model_shape(config, port):
    """The shape that the model gets."""
    inner = list(port.reshape.shape) if port.HasField("reshape") else list(port.dims)
    return ([-1] if config.max_batch_size > 0 else []) + inner


class OnnxModel:
    def __init__(self, folder, config, operators):
        self.config = config
        demand(config.platform == "onnxruntime_onnx", f"platform {config.platform}")
        options = ort.SessionOptions()
        for path in config.model_operations.op_library_filename:
            demand(Path(path).is_absolute(), f"the operator library {path} is not absolute")
            copy = folder / Path(path).name
            demand(copy.is_file(), f"there is no {copy}")
            demand(operators is None or copy.read_bytes() == operators.read_bytes(), f"{copy} is another library")
            options.register_custom_ops_library(str(copy))
        for group in config.instance_group:
            demand(group.count > 0, "an instance group of none")
        model = folder / "1" / "model.onnx"
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.hold(config.input, self.session.get_inputs(), exact=False)
        self.hold(config.output, self.session.get_outputs(), exact=True)

    def hold(self, ports, graph, exact):
        graph = {value.name: value for value in graph}
        demand(
            sorted(p.name for p in ports) == sorted(graph),
            f"configured are {[p.name for p in ports]}, the model has {list(graph)}",
        )
        for port in ports:
            found = graph[port.name]
            demand(TYPES[type_name(port)][0] == found.type, f"`{port.name}` is {found.type}, configured {type_name(port)}")
            demand(len(port.dims) > 0, f"`{port.name}` has no dims")
            shape = [d if isinstance(d, int) else -1 for d in found.shape]
            told = model_shape(self.config, port)
            if not shape:
                demand(self.config.max_batch_size == 0, f"`{port.name}` is a scalar in a model with batches")
                demand(all(d == 1 for d in told), f"the scalar `{port.name}` is configured as {told}")
                continue
            demand(
                len(shape) == len(told) and all(m == t or (m == -1 and not exact) for m, t in zip(shape, told)),
                f"`{port.name}` is {shape}, configured {told}",
            )
            demand(self.config.max_batch_size == 0 or shape[0] == -1, f"`{port.name}` has no open batch")

    def run(self, arrays):
        feed = {}
        for port, value in ((p, arrays[p.name]) for p in self.config.input):
            wanted = {v.name: v.shape for v in self.session.get_inputs()}[port.name]
            batch = list(value.shape[:1]) if self.config.max_batch_size > 0 else []
            if port.HasField("reshape"):
                value = value.reshape(batch + list(port.reshape.shape))
            feed[port.name] = value.reshape([]) if not wanted else value
        names = [p.name for p in self.config.output]
        return dict(zip(names, self.session.run(names, feed)))


class Ensemble:
    def __init__(self, folder, config, models):
        self.config, self.models = config, models
        demand((folder / "1").is_dir(), "an ensemble without a version")
        demand(not config.instance_group, "an ensemble with instances")
        known = {p.name: (type_name(p), list(p.dims)) for p in config.input}
        for step in config.ensemble_scheduling.step:
            demand(step.model_name in models, f"no model {step.model_name}")
            inner = models[step.model_name].config
            demand((inner.max_batch_size > 0) == (config.max_batch_size > 0), f"{step.model_name} is batched otherwise")
            demand(config.max_batch_size <= inner.max_batch_size, f"{step.model_name} has smaller batches")
            demand(sorted(step.input_map) == sorted(p.name for p in inner.input), f"{step.model_name}: not all its inputs")
            for port in inner.input:
                told = known[step.input_map[port.name]]
                demand(told == (type_name(port), list(port.dims)), f"{step.model_name}: `{port.name}` gets {told}")
            outputs = {p.name: p for p in inner.output}
            for own, name in step.output_map.items():
                demand(name not in known, f"`{name}` is made twice")
                known[name] = (type_name(outputs[own]), list(outputs[own].dims))
        for port in config.output:
            demand(known[port.name] == (type_name(port), list(port.dims)), f"`{port.name}` is {known[port.name]}")

    def run(self, arrays):
        tensors = dict(arrays)
        for step in self.config.ensemble_scheduling.step:
            out = self.models[step.model_name].run({own: tensors[name] for own, name in step.input_map.items()})
            tensors |= {name: out[own] for own, name in step.output_map.items()}
        return {p.name: tensors[p.name] for p in self.config.output}


def load(repository, operators):
    configs = {}
    for folder in sorted(p for p in repository.iterdir() if p.is_dir()):
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        config = text_format.Parse(text, schema.ModelConfig())
        demand(config.name == folder.name, f"{folder.name} is called {config.name}")
        configs[folder] = config
    models = {}
    # Ensembles after what they are made of.
    for folder, config in sorted(configs.items(), key=lambda item: item[1].platform == "ensemble"):
        try:
            if config.platform == "ensemble":
                models[config.name] = Ensemble(folder, config, models)
            else:
                models[config.name] = OnnxModel(folder, config, operators)
        except Fault as fault:
            raise Fault(f"{config.name}: {fault}") from None
    return models


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The two calls of Triton's protocol that a client of a pipeline makes."""

    def __init__(self, models):
        self.models = models
        self.calls = []

    def ModelMetadata(self, request, context):
        config = self.models[request.name].config
        reply = service_pb2.ModelMetadataResponse(name=config.name, versions=["1"], platform=config.platform)
        for ports, into in ((config.input, reply.inputs), (config.output, reply.outputs)):
            for port in ports:
                into.add(name=port.name, datatype=type_name(port).removeprefix("TYPE_"), shape=served_shape(config, port))
        return reply

    def ModelInfer(self, request, context):
        try:
            return self.infer(request)
        except Exception as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def infer(self, request):
        config = self.models[request.model_name].config
        ports = {p.name: p for p in config.input}
        demand(sorted(ports) == sorted(i.name for i in request.inputs), "the request has other inputs")
        arrays = {}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            port, shape = ports[tensor.name], list(tensor.shape)
            wanted = served_shape(config, port)
            demand("TYPE_" + tensor.datatype == type_name(port), f"`{tensor.name}` is {tensor.datatype}")
            demand(
                len(shape) == len(wanted) and all(w in (-1, s) for s, w in zip(shape, wanted)),
                f"`{tensor.name}` is {shape}, expected {wanted}",
            )
            demand(config.max_batch_size == 0 or shape[0] <= config.max_batch_size, f"a batch of {shape[0]}")
            arrays[tensor.name] = np.frombuffer(raw, TYPES[type_name(port)][1]).reshape(shape)
        self.calls.append(request.model_name)
        reply = service_pb2.ModelInferResponse(model_name=config.name, model_version="1")
        for name, array in self.models[config.name].run(arrays).items():
            datatype = {np.dtype(t): n for n, (_, t) in TYPES.items()}[array.dtype].removeprefix("TYPE_")
            reply.outputs.add(name=name, datatype=datatype, shape=array.shape)
            reply.raw_output_contents.append(np.ascontiguousarray(array).tobytes())
        return reply


def serve(models, client):
    service = Service(models)
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    program, *arguments = client
    command = [sys.executable, program, *arguments, "--server", f"127.0.0.1:{port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    server.stop(None)
    demand(done.returncode == 0, f"the client failed: {done.stderr}")
    return service.calls


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--operators", type=Path)
    parser.add_argument("--client", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    try:
        models = load(arguments.repository, arguments.operators)
        report = {"models": sorted(models)}
        if arguments.client:
            report["calls"] = serve(models, arguments.client)
    except (Fault, text_format.ParseError) as fault:
        report = {"failed": str(fault)}
    print(json.dumps(report))


main()
