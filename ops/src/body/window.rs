//! `WindowAttention`: a Loop over tiles of queries, each of which meets the keys that its
//! windows reach. Time is linear in the number of tokens, and the scores held are those of one
//! tile.

use super::{
    AttributeValue, BodyAttribute, BodyError, BodyFunction, BodyGraph, BodyNode, BodySpec, Builder,
    FormalAttribute, GraphValue, Heads, MAX_OPSET, RefKind, named,
};
use crate::schema::{
    ATTR_BORDER, ATTR_NUM_HEADS, ATTR_RADIUS, ATTR_SCALE, ATTR_TEXT, ATTR_WINDOW, Border,
    ElementType, OUTPUT_NAME, TextSide, WINDOW_ATTENTION, WINDOW_INPUT_NAMES, Window,
    WindowAttentionAttrs,
};

/// The oldest opset whose operators take the integers that positions are computed in.
pub const MIN_WINDOW_OPSET: i64 = 13;
/// Queries of a tile are this many rows and columns: larger tiles reach more keys that most of
/// their queries don't, smaller ones leave little to each product.
const TILE: i64 = 8;
/// Added to scores outside the window. Far below every score and far from infinity, which
/// would make NaN of a row without any key.
const OUTSIDE: f64 = -1e30;

/// What a function body can't tell at run time: a file has one function, and so one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WindowVariant {
    /// Form of the window.
    pub shape: WindowShape,
    /// What happens at the border.
    pub border: Border,
    /// Where the text lies.
    pub text: TextSide,
}

/// Form of a window, without its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WindowShape {
    /// Rows and columns.
    Rect,
    /// A circle.
    Circle,
}

impl From<Window> for WindowShape {
    fn from(window: Window) -> Self {
        match window {
            Window::Rect { .. } => Self::Rect,
            Window::Circle { .. } => Self::Circle,
        }
    }
}

impl WindowVariant {
    /// The variant that serves a node with these attributes.
    pub fn of(attrs: &WindowAttentionAttrs) -> Self {
        Self {
            shape: attrs.window.into(),
            border: attrs.border,
            text: attrs.text,
        }
    }
}

/// The body of the model-local function `ai.linfusion::WindowAttention`.
///
/// # Errors
/// [`BodyError`] when the opset is outside the range served.
pub fn window_attention_body(
    spec: BodySpec,
    variant: WindowVariant,
) -> Result<BodyFunction, BodyError> {
    check_window_spec(spec)?;
    let mut function = build(spec, variant, Attributes::Formal);
    let formal = |name: &str, default: Option<AttributeValue>| FormalAttribute {
        name: name.into(),
        default,
    };
    let text = |value: &str| Some(AttributeValue::String(value.into()));
    function.attributes = vec![
        formal(ATTR_NUM_HEADS, None),
        match variant.shape {
            WindowShape::Rect => formal(ATTR_WINDOW, None),
            WindowShape::Circle => formal(ATTR_RADIUS, None),
        },
        formal(ATTR_SCALE, Some(AttributeValue::Float(0.0))),
        formal(ATTR_BORDER, text(variant.border.name())),
        formal(ATTR_TEXT, text(variant.text.name())),
    ];
    Ok(function)
}

/// The same body with the attributes as constants, to be spliced into a graph: rename the inputs
/// `q`, `k`, `v`, `grid`, the output `out` and every inner name (each is written once).
///
/// # Errors
/// [`BodyError`] when the opset is outside the range served or an attribute out of range.
pub fn window_attention_inline(
    spec: BodySpec,
    attrs: &WindowAttentionAttrs,
) -> Result<BodyFunction, BodyError> {
    check_window_spec(spec)?;
    attrs.check()?;
    Ok(build(
        spec,
        WindowVariant::of(attrs),
        Attributes::Fixed(*attrs),
    ))
}

fn check_window_spec(spec: BodySpec) -> Result<(), BodyError> {
    if (MIN_WINDOW_OPSET..=MAX_OPSET).contains(&spec.opset) {
        return Ok(());
    }
    Err(BodyError::Opset {
        opset: spec.opset,
        min: MIN_WINDOW_OPSET,
        max: MAX_OPSET,
    })
}

impl WindowAttentionAttrs {
    /// The attributes of a node, as they are written.
    pub fn attributes(&self) -> Vec<BodyAttribute> {
        let int = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        let text = |value: &str| AttributeValue::String(value.into());
        let window = match self.window {
            Window::Rect { rows, cols } => named(
                ATTR_WINDOW,
                AttributeValue::Ints(vec![int(rows), int(cols)]),
            ),
            Window::Circle { radius } => named(ATTR_RADIUS, AttributeValue::Int(int(radius))),
        };
        vec![
            named(ATTR_NUM_HEADS, AttributeValue::Int(int(self.num_heads))),
            named(ATTR_SCALE, AttributeValue::Float(self.scale.unwrap_or(0.0))),
            window,
            named(ATTR_BORDER, text(self.border.name())),
            named(ATTR_TEXT, text(self.text.name())),
        ]
    }
}

/// Where the node's attributes come from.
#[derive(Clone, Copy)]
enum Attributes {
    Formal,
    Fixed(WindowAttentionAttrs),
}

/// Rows or columns of the grid.
#[derive(Clone, Copy)]
enum Side {
    Rows,
    Cols,
}

impl Side {
    const BOTH: [Self; 2] = [Self::Rows, Self::Cols];

    fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::Cols => "cols",
        }
    }

    fn index(self) -> i64 {
        match self {
            Self::Rows => 0,
            Self::Cols => 1,
        }
    }
}

/// Names of one side's sizes, int64 `[1]` each.
struct Sizes {
    /// Of the grid.
    grid: String,
    /// Of a tile of queries.
    tile: String,
    /// Tiles.
    tiles: String,
    /// Tiles times their size.
    padded: String,
    /// Of the window.
    window: String,
    /// Window before the query.
    before: String,
    /// Of the keys that a tile meets.
    reach: String,
    /// grid − reach: the last start of these keys.
    last: String,
    /// grid − window: the last start of a window that is shifted inside.
    last_window: String,
    /// 0, 1, … of a tile's queries.
    query_range: String,
    /// 0, 1, … of a tile's keys.
    key_range: String,
}

fn build(spec: BodySpec, variant: WindowVariant, attributes: Attributes) -> BodyFunction {
    let heads = match attributes {
        Attributes::Formal => Heads::Formal,
        Attributes::Fixed(attrs) => Heads::Fixed(attrs.num_heads),
    };
    let mut b = Builder {
        spec,
        heads,
        nodes: Vec::new(),
    };
    let [q, k, v, grid] = WINDOW_INPUT_NAMES;
    let zero = b.ints("zero", &[0]);
    let one = b.ints("one_int", &[1]);
    let token_axis = b.ints("token_axis", &[2]);
    let grid_axes = b.ints("grid_axes", &[2, 3]);

    let q = b.split_heads(q, [0, 2, 1, 3]);
    let k = b.split_heads(k, [0, 2, 1, 3]);
    let v = b.split_heads(v, [0, 2, 1, 3]);
    let q = b.scaled(&q, attributes);

    let q_shape = b.op("Shape", &[&q], "q_dims", vec![]);
    let v_shape = b.op("Shape", &[&v], "v_dims", vec![]);
    let batch_heads = b.range_of(&q_shape, 0, 2, "batch_heads");
    let tokens = b.range_of(&q_shape, 2, 3, "tokens");
    let channels = b.range_of(&q_shape, 3, 4, "channels");
    let value_channels = b.range_of(&v_shape, 3, 4, "value_channels");

    let sizes = Side::BOTH.map(|side| b.sizes(side, grid, variant, attributes, &zero, &one));
    let [rows, cols] = &sizes;
    let pixels = b.op("Mul", &[&rows.grid, &cols.grid], "pixels", vec![]);
    let text = b.op("Sub", &[&tokens, &pixels], "text_tokens", vec![]);

    // Image and text, each a range of the tokens.
    let (image_range, text_range) = match variant.text {
        TextSide::Prefix => ([&text, &tokens], [&zero, &text]),
        TextSide::Suffix => ([&zero, &pixels], [&pixels, &tokens]),
    };
    let mut part = |value: &str, range: [&String; 2], name: &str| {
        let inputs = [value, range[0], range[1], &token_axis];
        b.op("Slice", &inputs, name, vec![])
    };
    let q_text = part(&q, text_range, "q_text");
    let k_text = part(&k, text_range, "k_text");
    let v_text = part(&v, text_range, "v_text");
    let q_image = part(&q, image_range, "q_image");
    let k_image = part(&k, image_range, "k_image");
    let v_image = part(&v, image_range, "v_image");

    let split = |b: &mut Builder, value: &str, width: &str, name: &str| {
        let shape = [&batch_heads, &rows.grid, &cols.grid, width];
        let shape = b.concat(&shape, 0, &format!("{name}_shape"));
        b.op("Reshape", &[value, &shape], name, vec![])
    };
    let q_grid = split(&mut b, &q_image, &channels, "q_grid");
    let k_grid = split(&mut b, &k_image, &channels, "k_grid");
    let v_grid = split(&mut b, &v_image, &value_channels, "v_grid");

    // Queries are padded to whole tiles.
    let missing = [rows, cols].map(|s| {
        let name = format!("{}_missing", s.grid);
        b.op("Sub", &[&s.padded, &s.grid], &name, vec![])
    });
    let none = b.ints("none", &[0; 7]);
    let pads = b.concat(&[&none, &missing[0], &missing[1], &zero], 0, "pads");
    let q_padded = b.op("Pad", &[&q_grid, &pads], "q_padded", vec![]);

    let tile_queries = b.op("Mul", &[&rows.tile, &cols.tile], "tile_queries", vec![]);
    let tile_keys = b.op("Mul", &[&rows.reach, &cols.reach], "tile_keys", vec![]);
    let flatten = b.ints("flatten", &[0, 0, -1]);
    let q_flat = b.concat(&[&flatten, &channels], 0, "q_flat");
    let v_flat = b.concat(&[&flatten, &value_channels], 0, "v_flat");
    let ones = b.ints("ones", &[1, 1]);
    let mask_shape = b.concat(&[&ones, &tile_queries, &tile_keys], 0, "mask_shape");
    let text_mask_shape = b.concat(&[&ones, &tile_queries, &text], 0, "text_mask_shape");
    let zero_score = b.scalar("zero_score", 0.0);
    let text_mask = b.op(
        "Expand",
        &[&zero_score, &text_mask_shape],
        "text_mask",
        vec![],
    );
    let one_score = b.scalar("one_score", 1.0);
    let outside = b.scalar("outside", -OUTSIDE);
    let radius = b.radius(variant, attributes);

    let count = b.op("Mul", &[&rows.tiles, &cols.tiles], "tile_count", vec![]);
    let scalar = b.ints("scalar", &[]);
    let count = b.op("Reshape", &[&count, &scalar], "trips", vec![]);
    let is_one = b.op("Reshape", &[&one, &scalar], "one_scalar", vec![]);
    let to_bool = vec![named("to", AttributeValue::Int(BOOL))];
    let go_on = b.op("Cast", &[&is_one], "go_on", to_bool);

    // The Loop's body is built apart; it reads what was built so far.
    let outer = std::mem::take(&mut b.nodes);
    let index = b.op("Reshape", &["tile_index", &one], "tile_number", vec![]);
    let tile_row = b.op("Div", &[&index, &cols.tiles], "tile_row", vec![]);
    let before = b.op("Mul", &[&tile_row, &cols.tiles], "tiles_before", vec![]);
    let tile_col = b.op("Sub", &[&index, &before], "tile_col", vec![]);
    let mut starts = Vec::new();
    let mut key_starts = Vec::new();
    let mut inside = Vec::new();
    for ((side, s), tile) in Side::BOTH
        .into_iter()
        .zip(&sizes)
        .zip([&tile_row, &tile_col])
    {
        let n = side.name();
        let start = b.op("Mul", &[tile, &s.tile], &format!("{n}_start"), vec![]);
        let first = b.op("Sub", &[&start, &s.before], &format!("{n}_first"), vec![]);
        let key_start = b.clamped(&first, &zero, &s.last, &format!("{n}_key_start"));
        inside.push(b.inside(side, s, variant, &start, &key_start, &zero));
        starts.push(start);
        key_starts.push(key_start);
    }
    let tile =
        |b: &mut Builder, from: &str, at: &[String], size: [&str; 2], flat: &str, n: &str| {
            let ends: Vec<String> = at
                .iter()
                .zip(size)
                .enumerate()
                .map(|(i, (start, size))| {
                    b.op("Add", &[start, size], &format!("{n}_end_{i}"), vec![])
                })
                .collect();
            let start = b.concat(&[&at[0], &at[1]], 0, &format!("{n}_starts"));
            let end = b.concat(&[&ends[0], &ends[1]], 0, &format!("{n}_ends"));
            let inputs = [from, &start, &end, &grid_axes];
            let cut = b.op("Slice", &inputs, &format!("{n}_cut"), vec![]);
            b.op("Reshape", &[&cut, flat], n, vec![])
        };
    let queries = [rows.tile.as_str(), &cols.tile];
    let keys = [rows.reach.as_str(), &cols.reach];
    let q_tile = tile(&mut b, &q_padded, &starts, queries, &q_flat, "q_tile");
    let k_tile = tile(&mut b, &k_grid, &key_starts, keys, &q_flat, "k_tile");
    let v_tile = tile(&mut b, &v_grid, &key_starts, keys, &v_flat, "v_tile");
    let k_tile = b.concat(&[&k_tile, &k_text], 2, "k_all");
    let v_tile = b.concat(&[&v_tile, &v_text], 2, "v_all");
    let inside = match variant.shape {
        WindowShape::Rect => b.op("And", &[&inside[0], &inside[1]], "inside", vec![]),
        WindowShape::Circle => {
            let distance = b.op("Add", &[&inside[0], &inside[1]], "distance", vec![]);
            b.op("Less", &[&distance, &radius], "inside", vec![])
        }
    };
    let compute = b.spec.element.accumulator();
    let inside = b.cast(&inside, "inside_number", compute);
    let mask = b.op("Sub", &[&inside, &one_score], "mask_number", vec![]);
    let mask = b.op("Mul", &[&mask, &outside], "mask_grid", vec![]);
    let mask = b.op("Reshape", &[&mask, &mask_shape], "mask_keys", vec![]);
    let mask = b.concat(&[&mask, &text_mask], 3, "mask");
    let turned = b.transpose(&k_tile, "k_turned", &[0, 1, 3, 2]);
    let scores = b.op("MatMul", &[&q_tile, &turned], "scores", vec![]);
    let scores = b.op("Add", &[&scores, &mask], "masked_scores", vec![]);
    let weights = b.softmax(&scores, "weights");
    let tile_out = b.op("MatMul", &[&weights, &v_tile], "tile_out", vec![]);
    let proceed = b.op("Identity", &["tile_condition"], "tile_proceeds", vec![]);
    let body = std::mem::replace(&mut b.nodes, outer);
    let tiles = b.tiles(&count, &go_on, body, [&proceed, &tile_out]);

    // [tiles, B, H, queries, Dv] back to raster order.
    let unfold = [
        &rows.tiles,
        &cols.tiles,
        &batch_heads,
        &rows.tile,
        &cols.tile,
        &value_channels,
    ];
    let unfold = b.concat(&unfold.map(String::as_str), 0, "unfold");
    let tiles = b.op("Reshape", &[&tiles, &unfold], "tiles_apart", vec![]);
    let tiles = b.transpose(&tiles, "tiles_placed", &[2, 3, 0, 4, 1, 5, 6]);
    let fold = [&batch_heads, &rows.padded, &cols.padded, &value_channels];
    let fold = b.concat(&fold.map(String::as_str), 0, "fold");
    let image = b.op("Reshape", &[&tiles, &fold], "image_padded", vec![]);
    let origin = b.ints("origin", &[0, 0]);
    let image = b.op(
        "Slice",
        &[&image, &origin, grid, &grid_axes],
        "image_grid",
        vec![],
    );
    let image = b.op("Reshape", &[&image, &v_flat], "image_out", vec![]);

    // Text queries meet everything.
    let turned = b.transpose(&k, "k_all_turned", &[0, 1, 3, 2]);
    let scores = b.op("MatMul", &[&q_text, &turned], "text_scores", vec![]);
    let weights = b.softmax(&scores, "text_weights");
    let text = b.op("MatMul", &[&weights, &v], "text_out", vec![]);

    let out = match variant.text {
        TextSide::Prefix => b.concat(&[&text, &image], 2, "out_heads"),
        TextSide::Suffix => b.concat(&[&image, &text], 2, "out_heads"),
    };
    let out = b.merge_heads(&out);
    b.restore_element_type(&out);
    BodyFunction {
        name: WINDOW_ATTENTION.into(),
        inputs: WINDOW_INPUT_NAMES.map(String::from).to_vec(),
        outputs: vec![OUTPUT_NAME.into()],
        attributes: vec![],
        nodes: b.nodes,
    }
}

const BOOL: i64 = 9;
const INT64: i32 = 7;

impl Builder {
    fn concat(&mut self, inputs: &[&str], axis: i64, output: &str) -> String {
        let axis = vec![named("axis", AttributeValue::Int(axis))];
        self.op("Concat", inputs, output, axis)
    }

    fn softmax(&mut self, scores: &str, output: &str) -> String {
        let axis = vec![named("axis", AttributeValue::Int(-1))];
        self.op("Softmax", &[scores], output, axis)
    }

    /// Elements `from..to` of a vector.
    fn range_of(&mut self, vector: &str, from: i64, to: i64, output: &str) -> String {
        let start = self.ints(&format!("{output}_from"), &[from]);
        let end = self.ints(&format!("{output}_to"), &[to]);
        self.op("Slice", &[vector, &start, &end], output, vec![])
    }

    fn clamped(&mut self, value: &str, low: &str, high: &str, output: &str) -> String {
        let below = self.op("Min", &[value, high], &format!("{output}_most"), vec![]);
        self.op("Max", &[&below, low], output, vec![])
    }

    /// q times the scale, 1/√D where that is 0.
    fn scaled(&mut self, q: &str, attributes: Attributes) -> String {
        let compute = self.spec.element.accumulator();
        let mut inverse_root = |output: &str| {
            let shape = self.op("Shape", &[q], "q_heads_dims", vec![]);
            let width = self.range_of(&shape, 3, 4, "head_dim");
            let width = self.cast(&width, "head_dim_number", compute);
            let one = self.scalar("unit", 1.0);
            let root = self.op("Sqrt", &[&width], "head_dim_root", vec![]);
            self.op("Div", &[&one, &root], output, vec![])
        };
        let scale = match attributes {
            Attributes::Fixed(attrs) => match attrs.scale.filter(|s| *s != 0.0) {
                Some(scale) => self.scalar("scale", f64::from(scale)),
                None => inverse_root("scale"),
            },
            Attributes::Formal => {
                let default = inverse_root("default_scale");
                let value = AttributeValue::Ref {
                    attribute: ATTR_SCALE.into(),
                    kind: RefKind::Float,
                };
                let mut given = self.constant("given_scale_f32", "value_float", value);
                if compute == ElementType::F64 {
                    given = self.cast(&given, "given_scale", ElementType::F64);
                }
                // given + (given is 0) · default
                let nothing = self.scalar("no_scale", 0.0);
                let absent = self.op("Equal", &[&given, &nothing], "scale_absent", vec![]);
                let absent = self.cast(&absent, "scale_absent_number", compute);
                let instead = self.op("Mul", &[&absent, &default], "scale_instead", vec![]);
                self.op("Add", &[&given, &instead], "scale", vec![])
            }
        };
        self.op("Mul", &[q, &scale], "q_scaled", vec![])
    }

    /// r², int64 `[1]`; unused for a rectangle.
    fn radius(&mut self, variant: WindowVariant, attributes: Attributes) -> String {
        if variant.shape == WindowShape::Rect {
            return String::new();
        }
        let radius = self.radius_once(attributes);
        self.op("Mul", &[&radius, &radius], "radius_squared", vec![])
    }

    fn radius_once(&mut self, attributes: Attributes) -> String {
        const NAME: &str = "radius_int";
        if self.nodes.iter().any(|n| n.outputs[0] == NAME) {
            return NAME.into();
        }
        if let Attributes::Fixed(WindowAttentionAttrs {
            window: Window::Circle { radius },
            ..
        }) = attributes
        {
            return self.ints(NAME, &[radius as i64]);
        }
        let value = AttributeValue::Ref {
            attribute: ATTR_RADIUS.into(),
            kind: RefKind::Int,
        };
        let scalar = self.constant("radius_scalar", "value_int", value);
        let shape = self.ints("radius_shape", &[1]);
        self.op("Reshape", &[&scalar, &shape], NAME, vec![])
    }

    /// Rows or columns of the bounding box of the window, int64 `[1]`.
    fn window(&mut self, side: Side, shape: WindowShape, attributes: Attributes) -> String {
        let name = format!("{}_window", side.name());
        if shape == WindowShape::Circle {
            // −(r−1) … r−1
            let radius = self.radius_once(attributes);
            let twice = self.op("Add", &[&radius, &radius], &format!("{name}_twice"), vec![]);
            return self.op("Sub", &[&twice, "one_int"], &name, vec![]);
        }
        if let Attributes::Fixed(WindowAttentionAttrs {
            window: Window::Rect { rows, cols },
            ..
        }) = attributes
        {
            let size = match side {
                Side::Rows => rows,
                Side::Cols => cols,
            };
            return self.ints(&name, &[size as i64]);
        }
        let value = AttributeValue::Ref {
            attribute: ATTR_WINDOW.into(),
            kind: RefKind::Ints,
        };
        let both = self.constant(&format!("{name}_both"), "value_ints", value);
        self.range_of(&both, side.index(), side.index() + 1, &name)
    }

    fn sizes(
        &mut self,
        side: Side,
        grid: &str,
        variant: WindowVariant,
        attributes: Attributes,
        zero: &str,
        one: &str,
    ) -> Sizes {
        let n = side.name();
        let name = |what: &str| format!("{n}_{what}");
        let size = self.range_of(grid, side.index(), side.index() + 1, n);
        let most = self.ints(&name("tile_most"), &[TILE]);
        let tile = self.op("Min", &[&most, &size], &name("tile"), vec![]);
        let rounded = self.op("Add", &[&size, &tile], &name("rounded"), vec![]);
        let rounded = self.op("Sub", &[&rounded, one], &name("rounded_up"), vec![]);
        let tiles = self.op("Div", &[&rounded, &tile], &name("tiles"), vec![]);
        let padded = self.op("Mul", &[&tiles, &tile], &name("padded"), vec![]);
        let asked = self.window(side, variant.shape, attributes);
        let window = match variant.border {
            // A window larger than the grid is the grid.
            Border::Clamp => self.op("Min", &[&asked, &size], &name("window_inside"), vec![]),
            Border::Truncate => asked,
        };
        let two = self.ints(&name("two"), &[2]);
        let before = self.op("Div", &[&window, &two], &name("before"), vec![]);
        let reach = self.op("Add", &[&tile, &window], &name("reach_open"), vec![]);
        let reach = self.op("Sub", &[&reach, one], &name("reach_all"), vec![]);
        let reach = self.op("Min", &[&reach, &size], &name("reach"), vec![]);
        let last = self.op("Sub", &[&size, &reach], &name("last"), vec![]);
        let last_window = self.op("Sub", &[&size, &window], &name("last_window"), vec![]);
        let mut range = |of: &str, what: &str| {
            let scalar = self.ints(&name(&format!("{what}_scalar")), &[]);
            let mut number = |v: &str, end: &str| {
                self.op(
                    "Reshape",
                    &[v, &scalar],
                    &name(&format!("{what}_{end}")),
                    vec![],
                )
            };
            let (from, to, step) = (number(zero, "from"), number(of, "to"), number(one, "step"));
            self.op("Range", &[&from, &to, &step], &name(what), vec![])
        };
        let query_range = range(&tile, "query_range");
        let key_range = range(&reach, "key_range");
        Sizes {
            grid: size,
            tile,
            tiles,
            padded,
            window,
            before,
            reach,
            last,
            last_window,
            query_range,
            key_range,
        }
    }

    /// Of a tile's queries and keys on one side: for a rectangle, whether the key lies in the
    /// query's window; for a circle, the squared distance. `[rows, 1, rows of keys, 1]` or
    /// `[1, cols, 1, cols of keys]`.
    fn inside(
        &mut self,
        side: Side,
        s: &Sizes,
        variant: WindowVariant,
        start: &str,
        key_start: &str,
        zero: &str,
    ) -> String {
        let n = side.name();
        let name = |what: &str| format!("{n}_{what}");
        let (query_shape, key_shape) = match side {
            Side::Rows => ([-1, 1, 1, 1], [1, 1, -1, 1]),
            Side::Cols => ([1, -1, 1, 1], [1, 1, 1, -1]),
        };
        let mut place = |at: &str, range: &str, shape: &[i64; 4], what: &str| {
            let at = self.op("Add", &[at, range], &name(what), vec![]);
            let shape = self.ints(&name(&format!("{what}_shape")), shape);
            self.op(
                "Reshape",
                &[&at, &shape],
                &name(&format!("{what}_axis")),
                vec![],
            )
        };
        let query = place(start, &s.query_range, &query_shape, "query");
        let key = place(key_start, &s.key_range, &key_shape, "key");
        if variant.shape == WindowShape::Circle {
            let apart = self.op("Sub", &[&query, &key], &name("apart"), vec![]);
            return self.op("Mul", &[&apart, &apart], &name("apart_squared"), vec![]);
        }
        let mut first = self.op("Sub", &[&query, &s.before], &name("window_first"), vec![]);
        if variant.border == Border::Clamp {
            first = self.clamped(&first, zero, &s.last_window, &name("window_start"));
        }
        let end = self.op("Add", &[&first, &s.window], &name("window_end"), vec![]);
        let after = self.op("GreaterOrEqual", &[&key, &first], &name("after"), vec![]);
        let until = self.op("Less", &[&key, &end], &name("until"), vec![]);
        self.op("And", &[&after, &until], &name("inside"), vec![])
    }

    /// The Loop over all tiles: `[tiles, B, H, queries, Dv]`.
    fn tiles(
        &mut self,
        count: &str,
        go_on: &str,
        nodes: Vec<BodyNode>,
        [proceed, out]: [&str; 2],
    ) -> String {
        let value = |name: &str, element: i32, rank: usize| GraphValue {
            name: name.into(),
            element,
            rank,
        };
        let compute = self.spec.element.accumulator().onnx_code();
        let graph = BodyGraph {
            inputs: vec![
                value("tile_index", INT64, 0),
                value("tile_condition", BOOL as i32, 0),
            ],
            outputs: vec![value(proceed, BOOL as i32, 0), value(out, compute, 4)],
            nodes,
        };
        let body = vec![named("body", AttributeValue::Graph(graph))];
        self.op("Loop", &[count, go_on], "tiles", body)
    }
}

#[cfg(test)]
mod tests;
