use linfusion_convert::*;
use buffa::Message;
fn main(){
  for path in std::env::args().skip(1) {
    let bytes = bytes::Bytes::from(std::fs::read(&path).unwrap());
    let t=std::time::Instant::now();
    let model = linfusion_models::onnx::proto::ModelProto::decode(&mut bytes.clone()).unwrap();
    let read=|t:&linfusion_models::onnx::proto::TensorProto| -> Option<bytes::Bytes> {
        if let Some(r)=&t.raw_data { return Some(r.clone()); }
        if !t.int64_data.is_empty() { return Some(t.int64_data.iter().flat_map(|x|x.to_le_bytes()).collect::<Vec<u8>>().into()); }
        if !t.float_data.is_empty() { return Some(t.float_data.iter().flat_map(|x|x.to_le_bytes()).collect::<Vec<u8>>().into()); }
        if !t.int32_data.is_empty() && t.data_type==Some(6) { return Some(t.int32_data.iter().flat_map(|x|x.to_le_bytes()).collect::<Vec<u8>>().into()); }
        None };
    let shapes = shapes::Shapes::propagate(&model,&read,&shapes::Probe::TRACE);
    let graph = graph::Graph::new(&model.graph);
    let missing = graph.nodes().filter(|(_,n)| n.output.iter().any(|o| !o.is_empty() && shapes.shape(o).is_none())).map(|(_,n)| (graph::qualified_op(n), graph::label(n).to_owned())).collect::<Vec<_>>();
    let sites = attention::site::find(&model,&graph,&shapes);
    let c=|k| sites.iter().filter(|s| s.kind==k).count();
    use attention::kind::Kind::*;
    let ok = sites.iter().filter(|s| s.plain.is_ok()).count();
    println!("{} self {} cross {} joint {} other {} plain {} unnamed {} noshape {} {:?}", std::path::Path::new(&path).file_name().unwrap().to_str().unwrap(), c(SelfAttention), c(Cross), c(Joint), c(Other), ok, sites.iter().filter(|s| s.module.is_none()).count(), missing.len(), t.elapsed());
    if let Some(m)=missing.first() { println!("   first missing {m:?}"); }
    if std::env::var("V").is_ok() { for s in &sites { println!("   {} {:?} {:?} h{:?} d{:?} n{:?} ctx{:?} {}", s.anchor, s.kind, s.module, s.heads, s.head_dim, s.tokens, s.context_width, match &s.plain { Ok(p)=>format!("x={} {:?} merged={} {:?} out={:?} scale {} cols {:?}", p.x,p.x_layout,p.merged,p.merged_layout,p.out.as_ref().map(|o| o.result), p.scale, p.taps.iter().map(|t| format!("{} {:?}",t.value, match &t.columns { attention::plain::Columns::Listed(l) => format!("listed {}", l.len()), c => format!("{c:?}") })).collect::<Vec<_>>()), Err(e)=>e.clone() }); } }
    else { let mut r:Vec<_>=sites.iter().filter(|s| s.kind==SelfAttention || s.kind==Other).filter_map(|s| s.plain.as_ref().err()).collect(); r.dedup(); for e in r.iter().take(2) { println!("     {e}"); } }
  }
}
