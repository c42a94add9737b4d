//! The diffusion architectures: which attentions they have that may be converted, and where.
//!
//! Everything is generated from block patterns: a UNet has attention at some of its resolution levels,
//! `layers_per_block` transformers in every such down block, one in the middle and one more in every up
//! block. Full-size and shrunken models of one architecture differ only in a [`Structure`]'s numbers.

mod order;
mod recognise;
mod transformer;

pub use self::order::{canonical_module, execution_order};
pub use self::recognise::{Evidence, Recognition, SiteEvidence, Variant, recognise};

use std::fmt;

/// An architecture with a known layout of attentions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Stable Diffusion 1.x UNet: 16 self-attentions, 8 heads everywhere.
    Sd15,
    /// Stable Diffusion 2.x UNet: 16 self-attentions, 64 channels a head.
    Sd21,
    /// Stable Diffusion XL base UNet: 70 self-attentions, 64 channels a head.
    Sdxl,
    /// ControlNet for Stable Diffusion 1.x: 7 self-attentions, the encoder's and the middle one.
    ControlNet,
    /// PixArt-α and -Σ: 28 blocks of self-attention, 16 × 72, with cross-attention beside.
    PixArt,
    /// DiT-XL/2: 28 self-attentions, 16 × 72, class-conditional.
    Dit,
    /// SiT-XL/2: the same with `blocks.{i}.attn`.
    Sit,
    /// Stable Diffusion 3 medium: 24 attentions over image and text, 24 × 64.
    Sd3,
    /// Stable Diffusion 3.5 medium: the same, the first 13 blocks with a self-attention of the image
    /// beside.
    Sd35,
    /// FLUX.1: 19 double and 38 single blocks over text and image, 24 × 128.
    Flux,
}

/// What an attention that may be converted attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// The image to itself.
    SelfAttention,
    /// Text and image to both.
    Joint,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The numbers that tell models of one architecture apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Structure {
    /// Transformers in a down block; an up block has one more.
    pub layers_per_block: usize,
    /// One entry for each level that has attention, outermost first; for architectures whose middle block
    /// is a level of its own, that is the last. Transformers have one for each kind of block.
    pub levels: Vec<Level>,
    /// Width of the text embedding that cross-attention reads.
    pub context_width: usize,
    /// Height and width of the latent image that the model was trained on.
    pub native_latent: usize,
}

/// The transformers at one resolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    /// Channels.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Layers in each transformer, and so self-attentions.
    pub layers: usize,
}

/// One attention of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogueSite {
    /// What attends to what.
    pub kind: SiteKind,
    /// PyTorch path, e.g. `down_blocks.0.attentions.0.transformer_blocks.0.attn1`.
    pub module: String,
    /// Channels in and out.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Channels a head.
    pub head_dim: usize,
    /// Image tokens at the native size.
    pub tokens: usize,
    /// Resolution level: the latent's height and width are halved this many times.
    pub level: u32,
}

/// A block with attention: its path, how many transformers it has beyond `layers_per_block`, and its place.
struct Block {
    path: &'static str,
    transformers: Transformers,
    /// Index into `Structure::levels`.
    level: usize,
    /// Halvings of the latent image.
    halvings: u32,
}

#[derive(Clone, Copy)]
enum Transformers {
    PerLayer,
    PerLayerAndOne,
    One,
}

const fn block(
    path: &'static str,
    transformers: Transformers,
    level: usize,
    halvings: u32,
) -> Block {
    Block {
        path,
        transformers,
        level,
        halvings,
    }
}

use Transformers::{One, PerLayer, PerLayerAndOne};

/// In execution order.
const SD: &[Block] = &[
    block("down_blocks.0", PerLayer, 0, 0),
    block("down_blocks.1", PerLayer, 1, 1),
    block("down_blocks.2", PerLayer, 2, 2),
    block("mid_block", One, 3, 3),
    block("up_blocks.1", PerLayerAndOne, 2, 2),
    block("up_blocks.2", PerLayerAndOne, 1, 1),
    block("up_blocks.3", PerLayerAndOne, 0, 0),
];

const SDXL: &[Block] = &[
    block("down_blocks.1", PerLayer, 0, 1),
    block("down_blocks.2", PerLayer, 1, 2),
    block("mid_block", One, 1, 2),
    block("up_blocks.0", PerLayerAndOne, 1, 2),
    block("up_blocks.1", PerLayerAndOne, 0, 1),
];

const CONTROL_NET: &[Block] = &[
    block("down_blocks.0", PerLayer, 0, 0),
    block("down_blocks.1", PerLayer, 1, 1),
    block("down_blocks.2", PerLayer, 2, 2),
    block("mid_block", One, 3, 3),
];

impl Architecture {
    /// Every architecture of the catalogue.
    pub const ALL: [Self; 10] = [
        Self::Sd15,
        Self::Sd21,
        Self::Sdxl,
        Self::ControlNet,
        Self::PixArt,
        Self::Dit,
        Self::Sit,
        Self::Sd3,
        Self::Sd35,
        Self::Flux,
    ];
    /// Those that are UNets, or half of one.
    pub const UNETS: [Self; 4] = [Self::Sd15, Self::Sd21, Self::Sdxl, Self::ControlNet];

    /// Whether it is a transformer over patches of 2 × 2 latent pixels.
    pub fn is_transformer(self) -> bool {
        !Self::UNETS.contains(&self)
    }

    /// Short name, as reports print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sd15 => "sd15",
            Self::Sd21 => "sd21",
            Self::Sdxl => "sdxl",
            Self::ControlNet => "controlnet",
            Self::PixArt => "pixart",
            Self::Dit => "dit",
            Self::Sit => "sit",
            Self::Sd3 => "sd3",
            Self::Sd35 => "sd35",
            Self::Flux => "flux",
        }
    }

    /// The structure of the published full-size model.
    pub fn native(self) -> Structure {
        let level = |width, heads, layers| Level {
            width,
            heads,
            layers,
        };
        let (levels, context_width, native_latent) = match self {
            Self::Sd15 | Self::ControlNet => (
                vec![
                    level(320, 8, 1),
                    level(640, 8, 1),
                    level(1280, 8, 1),
                    level(1280, 8, 1),
                ],
                768,
                64,
            ),
            Self::Sd21 => (
                vec![
                    level(320, 5, 1),
                    level(640, 10, 1),
                    level(1280, 20, 1),
                    level(1280, 20, 1),
                ],
                1024,
                96,
            ),
            Self::Sdxl => (vec![level(640, 10, 2), level(1280, 20, 10)], 2048, 128),
            Self::PixArt => (vec![level(1152, 16, 28)], 1152, 128),
            Self::Dit | Self::Sit => (vec![level(1152, 16, 28)], 0, 32),
            Self::Sd3 => (vec![level(1536, 24, 24)], 0, 128),
            Self::Sd35 => (vec![level(1536, 24, 24), level(1536, 24, 13)], 0, 128),
            Self::Flux => (vec![level(3072, 24, 19), level(3072, 24, 38)], 0, 128),
        };
        Structure {
            layers_per_block: 2,
            levels,
            context_width,
            native_latent,
        }
    }

    /// The attentions of the published full-size model, in execution order.
    pub fn native_sites(self) -> Vec<CatalogueSite> {
        self.sites(&self.native())
    }

    /// The attentions of a model with this structure, in execution order. Levels that the structure
    /// lacks have no sites.
    pub fn sites(self, structure: &Structure) -> Vec<CatalogueSite> {
        if self.is_transformer() {
            return transformer::sites(self, structure);
        }
        let mut sites = Vec::new();
        for block in self.blocks() {
            let Some(level) = structure.levels.get(block.level) else {
                continue;
            };
            let side = structure.native_latent >> block.halvings;
            for transformer in 0..block.transformers.count(structure.layers_per_block) {
                for layer in 0..level.layers {
                    sites.push(CatalogueSite {
                        kind: SiteKind::SelfAttention,
                        module: format!(
                            "{}.attentions.{transformer}.transformer_blocks.{layer}.attn1",
                            block.path
                        ),
                        width: level.width,
                        heads: level.heads,
                        head_dim: level.width.checked_div(level.heads).unwrap_or(0),
                        tokens: side * side,
                        level: block.halvings,
                    });
                }
            }
        }
        sites
    }

    fn blocks(self) -> &'static [Block] {
        match self {
            Self::Sd15 | Self::Sd21 => SD,
            Self::Sdxl => SDXL,
            Self::ControlNet => CONTROL_NET,
            Self::PixArt | Self::Dit | Self::Sit | Self::Sd3 | Self::Sd35 | Self::Flux => &[],
        }
    }

    /// For each site in execution order, the index of its level in [`Structure::levels`].
    fn level_indices(self, structure: &Structure) -> Vec<usize> {
        self.blocks()
            .iter()
            .flat_map(|block| {
                let layers = structure.levels.get(block.level).map_or(0, |l| l.layers);
                let count = block.transformers.count(structure.layers_per_block) * layers;
                std::iter::repeat_n(block.level, count)
            })
            .collect()
    }
}

impl Transformers {
    fn count(self, layers_per_block: usize) -> usize {
        match self {
            PerLayer => layers_per_block,
            PerLayerAndOne => layers_per_block + 1,
            One => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_native_models_have_the_published_counts() {
        let cases = [
            (Architecture::Sd15, 16, 768),
            (Architecture::Sd21, 16, 1024),
            (Architecture::Sdxl, 70, 2048),
            (Architecture::ControlNet, 7, 768),
            (Architecture::PixArt, 28, 1152),
            (Architecture::Dit, 28, 0),
            (Architecture::Sit, 28, 0),
            (Architecture::Sd3, 24, 0),
            (Architecture::Sd35, 37, 0),
            (Architecture::Flux, 57, 0),
        ];
        for (architecture, count, context) in cases {
            assert_eq!(architecture.native_sites().len(), count, "{architecture}");
            assert_eq!(architecture.native().context_width, context);
        }
    }

    #[test]
    fn sites_carry_widths_and_tokens() {
        let sd15 = Architecture::Sd15.native_sites();
        let first = sd15.first().unwrap();
        assert_eq!(
            first.module,
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
        );
        assert_eq!((first.width, first.heads, first.head_dim), (320, 8, 40));
        assert_eq!((first.tokens, first.level), (4096, 0));
        let middle = &sd15[6];
        assert_eq!(
            middle.module,
            "mid_block.attentions.0.transformer_blocks.0.attn1"
        );
        assert_eq!((middle.head_dim, middle.tokens, middle.level), (160, 64, 3));

        let sdxl = Architecture::Sdxl.native_sites();
        let widths: Vec<_> = sdxl.iter().map(|s| (s.width, s.tokens)).collect();
        assert_eq!(widths[..4], [(640, 4096); 4]);
        assert_eq!(widths[4..64], [(1280, 1024); 60]);
        assert_eq!(widths[64..], [(640, 4096); 6]);
    }

    #[test]
    fn sites_come_in_execution_order() {
        for architecture in Architecture::UNETS {
            let modules: Vec<_> = architecture
                .native_sites()
                .into_iter()
                .map(|s| s.module)
                .collect();
            let order = execution_order(&modules);
            assert_eq!(order, (0..modules.len()).collect::<Vec<_>>());
        }
    }
}
