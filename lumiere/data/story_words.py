"""The words of the built-in stories: names, quotations, word lists and the sentences that every plot shares.

The notation is that of `lumiere.data.stories`, which holds the plots.
"""

WORDS = """
hero = {girl} | {boy}
friend = {girl} | {boy}
girl: {Onset}{vowel}{coda}{link}{vowel}{girl_end} | {Onset}{vowel}{link}{vowel}{link}{vowel}{girl_end}
boy: {Onset}{vowel}{coda}{link}{vowel}{boy_end} | {Onset}{vowel}{link}{vowel}{link}{vowel}{boy_end}
place = {Onset}{vowel}{coda}{link}{vowel}{place_end}
new_place = {Onset}{vowel}{link}{vowel}{place_end}
pet = {Onset}{vowel}{coda}{link}{vowel}{pet_end}
spell: {Onset}{vowel}{coda}{link}{vowel} {link}{vowel}{coda}{link}{vowel}
onset: b | bl | br | dr | fl | gl | fr | gr | j | kl | kr | l | m | n | pl | pr | ch | r | s | sn | st | t | th | tr
  | v | w | y | z
link: b | bl | gl | l | m | n | r | s | t | th | v | br | kr | st | tr
vowel: a | e | i | o | u
coda: l | m | n | r
girl_end: la | na | ra | ma | va | ka | ta | sha | lla | nna | ssa | ria | nia | bella | mina
boy_end: t | n | r | l | m | sh | rn | lt | nd | lf | rth | nn
place_end: wick | dale | mere | ford | ton | holm | stead | brook | field | haven | moor | gate | bury | combe | ness
pet_end: bble | ppin | ddle | zzy | mble | ffin | nkle | bbles | tty | psy | mpet | bbit
words = {saying} | {saying} | {rhyme}
saying:
  {Many} {colour} {trinkets} are worth less than one {mood} {beast}
  | Never count your {trinkets} before the {beast} is {doing}
  | Whoever follows the {mood} {beast} will find {many} {trinkets}
  | Even the {mood} {beast} was once afraid of a {look} {treasure}
  | The {mood} {beast} comes first, but the {mood} {beast} brings the {snacks}
  | A {beast} with {many} {trinkets} still needs a {mood} friend
  | Give a {beast} your {snacks}, and it will lend you its {treasure}
  | It takes {many} {beasts} to lift a {look} {treasure}
  | A {look} {treasure} shines brightest in the paws of a {mood} {beast}
  | Where {many} {beasts} can sleep, there is room for a {beast} too
  | When the {beast} is {doing}, the {beasts} find the {snacks}
  | Be as {mood} as a {beast} and as {mood} as {many} {beasts}
rhyme:
  {Colour} {trinkets}, one, two, three, bring the {mood} {beast} home to me
  | Hush now, {beast}, do not cry, {many} {trinkets} fill the sky
  | Over the {land}, under the moon, the {mood} {beast} is coming soon
  | Stir the {snacks} and ring the bell, {many} {beasts} wish you well
  | Round the {land} and up the stair, {many} {beasts} are waiting there
  | {Many} {beasts} upon a wall, the {mood} {beast} will never fall
  | Row, {mood} {beast}, row away, and bring us {snacks} on market day
  | {Mood} {beast}, {mood} {beast}, dance with me, past the {land} and down to the sea
  | Warm as {snacks} and bright as day, a {colour} {treasure} shows the way
  | One for the {beast} and two for the {beast}, {many} {trinkets} to set out the feast
password =
  {spell}
  | {spell}
  | {Many} {beasts} and a {look} {treasure}
  | Make way for the {mood} {beast} of the {land}
  | {Colour} {trinkets} and {colour} {trinkets}
promise =
  I will send you {many} {colour} {trinkets} before the first {season_sign}
  | I will wave a {colour} {cloth} from the {land} every {weekday}
  | I will save you {many} {snacks} and a {look} {treasure}
  | I will come and find you when the {beasts} cross the {land}
  | I will keep a {colour} {treasure} in my window until you come back
  | I will think of you whenever I see a {mood} {beast}
riddle =
  What has {many} {trinkets} but cannot {act}
  | What is {colour} by day and {colour} by night and loves to {act}
  | What can {act} all day in the {land} but never meets a {beast}
  | What do {many} {beasts} have that one {beast} has not
  | What is as {mood} as a {beast} and as {look} as a {treasure}
learn = swim | whistle | juggle | dance | skate | ride a pony | row a boat | play the {instrument}
  | tie a sailor's knot | stand on one leg | sing in tune | climb a rope | walk on stilts | paint a {beast}
  | catch a ball | read a map
instrument: fiddle | flute | drum | trumpet | piano | harp | accordion | cello | bagpipes
act: sing | dance | whistle | swim | climb | bake bread | tell the time | catch a cold | tie a knot | ride a pony
  | snore
few: two | three | four | five | six | seven | eight | nine
many: two | three | four | five | six | seven | eight | nine | ten | eleven | twelve | thirteen | twenty | thirty
  | forty | fifty | ninety | a hundred | a thousand
colour: red | blue | green | yellow | orange | purple | pink | white | black | brown | grey | silver | golden
  | scarlet | violet | crimson | copper | amber | turquoise | emerald | ivory | lilac | striped | spotted
mood: sleepy | cheerful | grumpy | patient | brave | clever | gentle | shy | proud | hungry | merry | quiet | noisy
  | lazy | polite | curious | clumsy | kind | jolly | stubborn | humble | playful | loving | careful | dreamy | nimble
  | wise | bold | silly | thoughtful | restless | graceful | bashful | eager | nervous | generous | loyal | dizzy
  | fearless
look: shiny | rusty | tiny | crooked | painted | dusty | round | heavy | hollow | broken | polished | borrowed
  | tattered | forgotten | enormous | smooth | wobbly | sparkling | ancient | plain | patched | magic | lopsided
  | precious
beast: duck | goose | goat | donkey | pony | cat | owl | robin | swan | crow | frog | toad | snail | turtle | seal
  | deer | lizard | moth | heron | magpie | puffin | penguin | lamb | hen | rooster | calf | sparrow | beetle
  | cricket | swallow | pigeon | newt | walrus | camel | elephant | lion | zebra | giraffe | parrot | monkey | whale
  | crab | kitten | puppy
beasts: ducks | goats | donkeys | ponies | cats | owls | swans | crows | frogs | snails | turtles | seals | lizards
  | moths | herons | penguins | lambs | hens | sparrows | beetles | crickets | swallows | pigeons | camels | elephants
  | lions | zebras | parrots | monkeys | whales | crabs | kittens | puppies | bees | geese | ants | spiders | bats
  | dolphins
runner = {beast}
keeper = {beast}
herd = goats | lambs | hens | geese | ducks | donkeys | ponies | sheep | calves | piglets | chicks
small_beast = duckling | kitten | robin | lamb | sparrow | owlet | rabbit | squirrel | hedgehog | fawn | puppy
  | gosling | tortoise | dormouse | fox cub | swallow | kid goat | blackbird | leveret | cygnet
trinkets: buttons | pebbles | feathers | acorns | shells | marbles | ribbons | beads | keys | candles | spoons
  | thimbles | coins | bells | pinecones | chestnuts | stamps | corks | lanterns | kettles | umbrellas | mittens
  | pillows | teacups | ladders | whistles | needles | bottles | baskets | slippers | apples | pumpkins | turnips
  | petals | balloons
treasure: lantern | kite | music box | compass | whistle | drum | scarf | teapot | telescope | spinning top
  | snow globe | pocket watch | bell | flute | puppet | rocking horse | toy boat | marble | locket | paintbrush
  | storybook | fiddle | birdcage | clock | umbrella | ring | mirror | hat | jug | lamp | trumpet | model ship
  | chess set | tin soldier | wind chime | candlestick | globe | sledge | wooden spoon | magnifying glass | quilt
  | walking stick
thing = {treasure}
hue = {colour}
answer = {treasure}
snacks: pancakes | biscuits | dumplings | muffins | waffles | plums | cherries | pears | noodles | pickles | walnuts
  | strawberries | carrots | crumpets | raisins | peaches | doughnuts | sandwiches | blackberries | figs | radishes
cake = honey cake | apple pie | plum tart | carrot cake | cherry pie | ginger loaf | pumpkin pie | lemon cake
  | walnut bread | blueberry pie | almond cake | raisin loaf | chestnut pie | poppy seed cake | rhubarb crumble
  | banana bread | fig roll
crop = pumpkin | sunflower | melon | cabbage | turnip | marrow | rose | cucumber | bean | tomato | carrot | lily
  | beetroot
drink: tea | cocoa | milk | cider | elderflower juice | apple juice | barley soup | mint tea | onion soup | lemonade
cloth: scarf | handkerchief | flag | ribbon | blanket | sock | apron | shawl | curtain
land: hill | forest | river | lake | meadow | valley | mountain | harbour | island | bridge | orchard | marsh
  | waterfall | castle | desert | garden | cave | village green | heath | railway | windmill | well
landmark: the old mill | the crooked tower | the mossy well | the stone bridge | the willow pond | the apple orchard
  | the white chapel | the ruined castle | the market square | the ferry landing | the fishing huts
  | the railway bridge | the great oak | the sleeping quarry | the lighthouse | the blacksmith's forge | the hay barn
  | the bluebell wood | the schoolhouse | the duck pond | the weaver's cottage | the bakery | the clock tower
nook: under the bed | behind the curtains | inside the teapot | beneath the stairs | in the flour jar
  | behind the woodpile | on top of the cupboard | in a boot | under the doormat | among the cabbages
  | in the coal bucket | up the chimney | inside the piano | between the cushions | in the garden shed | down the well
  | under the hen house | in the hayloft
creature: fox | hedgehog | rabbit | mouse | squirrel | badger | otter | bear | mole | beaver | hare | raccoon | child
  | child | child | child | child | child | child
kind = {young} {creature}
young: little | small | young | curious | cheerful | quiet | dreamy | freckled | clever | thoughtful | lively | shy
  | messy | brave | polite | stubborn
job = baker | miller | weaver | potter | shepherd | beekeeper | clockmaker | gardener | sailor | carpenter | librarian
  | painter | tailor | cobbler | teacher | doctor | ferry keeper | candle maker | fiddler | toymaker | mapmaker
  | letter carrier | stargazer | fisher | cook | blacksmith | cheesemaker | bookbinder | kite maker | glassblower
  | innkeeper | piano tuner | juggler | chimney sweep | button seller | train driver
town: town | village | hamlet | harbour | valley | fishing village | market town
season_sign: snow | frost | swallow | snowdrop | harvest moon | blossom | acorn | thunder | strawberry
weekday: Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday
doing: asleep | awake | singing | dancing | at sea | on the roof | in the bath | at the market | having supper
  | hiding
softly: softly | slowly | quietly | carefully | twice | with a smile | with shining eyes | word by word
  | in a small voice
pastime: collecting {trinkets} | counting clouds | reading about {beasts} | drawing maps | climbing trees
  | telling jokes | singing to the {beasts} | painting {trinkets} | listening to the rain | making up songs
  | building towers of {trinkets} | skipping stones | dressing up as a {beast} | asking questions | eating {snacks}
  | watching the trains go by | whittling little {beasts} | sewing hats for the {beasts} | watching {beasts}
  | inventing new words
opening:
  In the [little|quiet|sleepy|windy|old|sunny] {town} of {place} there lived a {kind} named {hero}. {trait}
  | {hero} was a {kind} who lived in {place}, [close to|just behind|not far from|right beside] {landmark}. {trait}
  | Once upon a time, [close to|behind|beside] {landmark} in {place}, there lived a {kind} called {hero}. {trait}
  | Beyond the [blue|misty|rolling|green] hills, in the {town} of {place}, there lived a {kind} named {hero}. {trait}
  | Everybody in {place} knew {hero}, the {kind} who lived [above the bakery|by the river|at the end of the lane].
    {trait}
  | There was once a {kind} whose name was {hero}. {Hero.their} home was [a tall house|a cottage|a round house|an
    attic] in {place}, [near|beside|behind] {landmark}. {trait}
trait:
  {hero} loved {pastime}.
  | More than anything, {hero} loved {pastime}.
  | {hero} was good at {pastime}.
  | Every day {hero} spent an hour {pastime}.
  | {hero} liked {pastime} and {pastime}.
  | {hero} always carried {many} {trinkets} [in a bag|in a {colour} box|on a string], just in case.
  | People said that nobody in {place} was as {mood} as {hero}.
day:
  one [soft|bright|rainy|fresh] spring [morning|day], while [blossom drifted down|lambs called from the hills|the ice
    melted],
  | one [hot|golden|still|bright] summer [morning|day], while [bees hummed|the roads lay dusty|swallows dipped and
    turned],
  | one [misty|crisp|windy|grey] autumn [morning|day], while [leaves tumbled|geese flew south|the apples ripened],
  | one [cold|frosty|snowy|silent] winter [morning|day], while [ice shone on the puddles|smoke curled from the
    chimneys|snow lay on every roof],
  | one {weekday} in [April|May|June|July|August|September|October|November],
  | early one {weekday}, before the [baker was up|bells rang|{beasts} were awake],
  | on the day of the {weekday} market,
sad:
  {hero} sat down [on the step|on a stone|on an upturned bucket] and [sighed|sniffed|frowned|put {hero.their} chin on
    {hero.their} knees].
  | A [tear|big tear] rolled down {hero}'s nose.
  | "Oh dear," said {hero}. "[What now|What shall I do now]?"
  | {hero} felt as small as a {beast}.
  | Poor {hero} did not know what to do.
  | {hero} [felt like crying|bit {hero.their} lip|almost gave up].
  | {Hero.their} heart felt as heavy as a sack of {trinkets}.
meets:
  Just then {friend} the {job} came [by|along the lane|over the hill] with a basket of {snacks}.
  | So {hero} went to see {friend}, the {job} who lived [near|beside|behind] {landmark}.
  | [On the way|On the path|At the crossroads] {hero} met a {job} named {friend}, who wore a {colour}
    [hat|coat|scarf].
  | {hero}'s neighbour, a {mood} {job} called {friend}, [looked over the fence|opened a window|came to the gate].
  | "[Is something wrong|What is the matter|Can I help], {hero}?" asked {friend}, the {mood} {job}.
  | Luckily {hero} had a friend called {friend}, the [best|oldest|kindest|cleverest] {job} in {place}.
speaks:
  "[Do not worry|Cheer up|Take heart], {hero}," said {friend}. "{words}."
  | {friend} [sat down|thought for a while|smiled kindly|shook {friend.their} head]. "{words}," said {friend}.
  | "My [grandmother|grandfather|old teacher] had words for that," said {friend}. "{words}."
  | {friend} bent down to {hero} and said, "{words}."
  | "{words}," said {friend}. "[That is all I know|Never forget it|Everyone should know that], {hero}."
echo:
  "{words}," {hero} repeated {softly}.
  | {hero} nodded and said it too: "{words}."
  | {hero} had never heard that before. "{words}," {hero.they} said {softly}.
  | "{words}?" asked {hero}. "{words}," said {friend} again, and [smiled|winked|laughed].
  | "{words}," whispered {hero}, and [felt a little better|stood up straight|smiled at last|dried {hero.their} eyes].
  | {hero} liked the sound of it. "{words}," {hero.they} said to {friend}.
echo_alone:
  "{words}," {hero} repeated {softly}.
  | {hero} said it aloud in the empty kitchen: "{words}."
  | "{words}," whispered {hero}, and blushed.
echo_note:
  "{words}," {hero} read {softly}, and knew that it came from {friend}.
  | {hero} read it {few} times. "{words}." Only {friend} could have written that.
recall:
  "{words}," {hero} [murmured|whispered|told {hero.them}self|said aloud], and took a deep breath.
  | {hero} thought of what {friend} had told {hero.them}: "{words}."
  | "Remember, {hero}," said {friend} [softly|at {hero.their} side|once more]. "{words}."
  | All the while {hero} was saying, "{words}."
  | "{words}," said {hero} and {friend} together.
joy:
  {hero} [laughed|danced|clapped|cheered] with joy.
  | {hero} hugged {friend}, and {friend} hugged {hero}.
  | "[Hurrah|How wonderful|Look at that]!" cried {hero}.
  | "Thank you, {friend}," said {hero}. "[I am so glad|You are a true friend]."
  | {hero} was as [happy|merry|pleased] as {many} {beasts}.
  | {friend} beamed, and {hero} [beamed too|jumped for joy].
farewell:
  [That evening|That night|At sunset], {friend} and {hero} shared a pot of {drink}. "{words}," said {friend}.
    "{words}," answered {hero}, and they both laughed.
  | From then on, whenever anybody in {place} was sad, {hero} told them, "{words}."
  | {hero} wrote it [over the door|on the wall|on a {colour} card] in {colour} letters: "{words}."
  | "{words}," said {friend} [at the gate|at bedtime|as the moon rose], and {hero} knew that it was true.
  | And if you ever visit {place}, you may hear {hero} and {friend} say it still: "{words}."
  | {friend} made a song of it, and soon all of {place} was singing, "{words}."
closing:
  {hero} fell asleep smiling.
  | And {hero} never forgot that day.
  | It was the best day that {hero} could remember.
  | Above {place} the stars came out, one by one.
  | {hero} and {friend} stayed friends for ever.
  | And that night there were {snacks} for supper.
  | And so all was well in {place}.
  | That night {hero} dreamed of {many} {colour} {beasts}.
  | After that, {hero} was never quite so [lonely|afraid|sad] again.
  | {hero} slept soundly, and so did {friend}.
  | "Good night, {hero}," said {friend}. "Good night, {friend}," said {hero}.
"""
