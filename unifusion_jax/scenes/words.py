"""Vocabulary of scenes: synonyms, and facts that stand for a colour, a shape or a number.

Every phrase has one meaning only, so the constraints of a prompt can be read off its words.
"""

SIZES = {
    'small': ('small', 'little', 'tiny'), 'medium': ('medium', 'medium-sized', 'mid-sized'),
    'large': ('large', 'big', 'huge')}
# Before the colour, and after the noun.
FILLS_BEFORE = {
    'solid': ('solid', 'filled'), 'striped': ('striped', 'stripy'), 'outlined': ('outlined', 'hollow')}
FILLS_AFTER = {
    'solid': ('filled in', 'with a solid fill', 'completely filled'),
    'striped': ('with stripes', 'with a stripe pattern', 'filled with stripes'),
    'outlined': ('drawn as an outline', 'with only its outline drawn', 'outline only')}
COLOURS = {
    'red': ('red',), 'orange': ('orange',), 'yellow': ('yellow',), 'green': ('green',),
    'cyan': ('cyan', 'turquoise'), 'blue': ('blue',), 'purple': ('purple', 'violet'), 'pink': ('pink',),
    'brown': ('brown',), 'white': ('white',), 'grey': ('grey', 'gray'), 'black': ('black',)}
SHAPES = {
    'circle': ('circle', 'disc'), 'square': ('square',), 'triangle': ('triangle',), 'star': ('star',),
    'heart': ('heart',), 'cross': ('cross', 'plus sign'), 'ring': ('ring',),
    'crescent': ('crescent', 'crescent moon'), 'diamond': ('diamond', 'rhombus'), 'hexagon': ('hexagon',)}
PLURALS = {'cross': 'crosses', 'rhombus': 'rhombuses'}

PLACES = {
    'top left': ('at the top left', 'in the top left corner', 'in the upper left corner', 'at the upper left'),
    'top center': ('at the top center', 'in the middle of the top edge', 'in the center of the upper part'),
    'top right': ('at the top right', 'in the top right corner', 'in the upper right corner', 'at the upper right'),
    'middle left': ('at the middle left', 'halfway down the left side', 'in the middle of the left side'),
    'center': ('at the center', 'in the center', 'in the very middle'),
    'middle right': ('at the middle right', 'halfway down the right side', 'in the middle of the right side'),
    'bottom left': ('at the bottom left', 'in the bottom left corner', 'in the lower left corner',
                    'at the lower left'),
    'bottom center': ('at the bottom center', 'in the middle of the bottom edge', 'in the center of the lower part'),
    'bottom right': ('at the bottom right', 'in the bottom right corner', 'in the lower right corner',
                     'at the lower right')}
RELATIONS = {
    'left of': ('left of', 'to the left of'), 'right of': ('right of', 'to the right of'),
    'above': ('above', 'over', 'higher up than'), 'below': ('below', 'under', 'lower down than'),
    'between': ('between', 'in between', 'right between')}

# {0} and {1} are the colours.
BACKGROUNDS = {
    'plain': ('a {0} background', 'a plain {0} background', 'a {0} backdrop'),
    'gradient': ('a background fading from {0} to {1}', 'a background going from {0} at the top to {1} at the bottom',
                 'a gradient from {0} down to {1}'),
    'checkered': ('a {0} and {1} checkered background', 'a checkerboard of {0} and {1}',
                  'a checkered {0} and {1} backdrop')}

# 'in the colour of ...'
COLOUR_FACTS = {
    'red': ('a ripe tomato', 'a fire engine', 'a stop sign', 'fresh blood'),
    'orange': ('a carrot', 'a pumpkin', 'a basketball', 'a tangerine'),
    'yellow': ('a ripe banana', 'a lemon', 'the petals of a sunflower', 'a baby chick'),
    'green': ('grass', 'spinach', 'a cucumber', 'an emerald'),
    'cyan': ('the C in CMYK', 'green and blue light mixed',
             'the printer ink that is neither magenta nor yellow nor black'),
    'blue': ('a sapphire', 'denim jeans', 'a blueberry', 'the sea on a map'),
    'purple': ('an aubergine', 'a ripe plum', 'an amethyst', 'red and blue paint mixed'),
    'pink': ('a flamingo', 'bubblegum', 'a piglet', 'red and white paint mixed'),
    'brown': ('chocolate', 'coffee beans', 'tree bark', 'a chestnut'),
    'white': ('fresh snow', 'milk', 'a polar bear', 'a swan'),
    'grey': ('an elephant', 'ash', 'a rain cloud', 'concrete'),
    'black': ('coal', 'a raven', 'tar', 'a panther')}
# 'a ...-coloured ring'
COLOUR_FACTS_BEFORE = {
    'red': ('stop-sign', 'tomato'), 'orange': ('carrot', 'pumpkin'), 'yellow': ('lemon', 'banana'),
    'green': ('grass', 'spinach'), 'cyan': (), 'blue': ('sapphire', 'blueberry'), 'purple': ('aubergine', 'amethyst'),
    'pink': ('flamingo', 'bubblegum'), 'brown': ('chocolate', 'chestnut'), 'white': ('snow', 'milk'),
    'grey': ('elephant', 'concrete'), 'black': ('coal', 'raven')}
# 'a shape ...'
SHAPE_FACTS = {
    'circle': ('like a coin', 'like the full moon', 'like a dinner plate', 'that a compass draws'),
    'square': ('like a chessboard', 'like the face of a cube', 'like a sticky note'),
    'triangle': ('with three sides', 'like a slice of pizza', 'like a pyramid seen from the side',
                 'like a yield sign'),
    'star': ("like a sheriff's badge", 'like the top of a Christmas tree', 'from the flag of Vietnam',
             'with five points'),
    'heart': ("sent on Valentine's Day", 'that stands for love', 'like the organ that pumps blood'),
    'cross': ('from the flag of Switzerland', 'from a first-aid kit', 'that means addition'),
    'ring': ('like a wedding band', 'like a doughnut', 'like a hula hoop', 'like a lifebuoy'),
    'crescent': ('like a croissant', 'like the moon a few days after new moon', 'like a sickle'),
    'diamond': ('like a baseball infield', 'like a square standing on its corner', 'like a kite'),
    'hexagon': ('with six sides', 'like a honeycomb cell', 'like the head of a bolt')}
# 'as many ... as ...'
COUNT_FACTS = {
    2: ('a bicycle has wheels', 'a person has eyes', 'a bird has wings', 'a pair of scissors has blades'),
    3: ('a tricycle has wheels', 'a triangle has sides', 'a traffic light has lamps', 'a trilogy has books'),
    4: ('a car has wheels', 'a dog has legs', 'a year has seasons', 'a square has corners')}


def plural(noun: str) -> str:
  """'plus signs', 'crosses', 'crescent moons'."""
  return PLURALS.get(noun) or MORE_PLURALS.get(noun, noun + 's')


def article(phrase: str) -> str:
  return f'an {phrase}' if phrase[0] in 'aeiou' else f'a {phrase}'


# Further words of the wider world, for training alone; each has one meaning only, too.
MORE_SIZES = {'small': ('mini', 'wee'), 'medium': ('middle-sized', 'average-sized'), 'large': ('giant', 'enormous')}
MORE_FILLS = {'solid': ('filled-in',), 'striped': ('stripey',), 'outlined': ('unfilled', 'empty')}
MORE_COLOURS = {'red': ('scarlet',), 'cyan': ('aqua',), 'blue': ('royal blue',), 'pink': ('hot pink',)}
MORE_SHAPES = {'circle': ('disk', 'round shape'), 'square': ('box',), 'heart': ('love heart',), 'cross': ('plus',),
               'ring': ('donut', 'hoop'), 'crescent': ('moon crescent',), 'diamond': ('lozenge',)}
MORE_PLURALS = {'box': 'boxes', 'plus': 'pluses'}
MORE_PLACES = {
    'top left': ('top left', 'upper left', 'top-left', 'in the top left', 'top left corner', 'on the top left'),
    'top center': ('top center', 'top middle', 'in the top middle', 'at the top in the middle'),
    'top right': ('top right', 'upper right', 'top-right', 'in the top right', 'top right corner', 'on the top right'),
    'middle left': ('middle left', 'center left', 'on the left in the middle', 'at the left halfway down'),
    'center': ('center', 'in the middle', 'right in the center', 'middle of the picture'),
    'middle right': ('middle right', 'center right', 'on the right in the middle', 'at the right halfway down'),
    'bottom left': ('bottom left', 'lower left', 'bottom-left', 'in the bottom left', 'bottom left corner',
                    'on the bottom left'),
    'bottom center': ('bottom center', 'bottom middle', 'in the bottom middle', 'at the bottom in the middle'),
    'bottom right': ('bottom right', 'lower right', 'bottom-right', 'in the bottom right', 'bottom right corner',
                     'on the bottom right')}
