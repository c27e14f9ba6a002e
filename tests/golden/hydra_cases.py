"""Adversarial configurations for test_hydra.py: inputs only, hydra-core says what they mean."""

# A group that every defaults list below may use.
GROUP = {'db/mysql.yaml': 'name: mysql\n', 'db/pg.yaml': 'name: pg\n', 'db/base.yaml': 'x: base\n'}

# Trees, and overrides applied to each of them one at a time.
SMALL_TREE = 'a: 1\nb: {c: 2, d: [1,2]}\nn: null\nm: ???\n'
# of SMALL_TREE
SMALL_OVERRIDES = ['a=2', 'a=', 'a=null', "a='x y'", 'a="q\\"z"', "a='it\\'s'", 'a=x=y', 'a=2:4', 'a=a:b', 'a=a: b',
 'a=[1, 2,x]', 'a={x:1,y:[2]}', 'b={c:5}', 'b={e:5}', 'b=5', 'a={x: 1}', '+z=1', '+a=2',
 '+b={e:5}', '+b.e=4', '++a.x=3', '++b.q.r=3', '~a', '~a=1', '~a=2', '~b', '~b={c:2,d:[1,2]}',
 '~zz', 'zz=1', 'b.d=[3]', 'b.d.0=7', 'b.d.5=7', '+b.d.2=3', 'a=1_000', 'a=0x1', 'a=010', 'a=1e3',
 'a=.5', 'a=5.', 'a=inf', 'a=-NaN', 'a=True', 'a=NULL', 'a=~', 'a=yes', 'a=1,2', 'a=choice(1,2)',
 'a=int(3.7)', 'a=float(3)', 'a=str(3)', 'a=bool(yes)', 'a=bool(no)', 'a=bool(1)', "a=int('12')",
 'a=json_str({a:1,b:[x,null,true,1.5]})', 'a=str([1,2])', 'a=int([1.5,2])', 'a=float({a:1})',
 'a=str({a:1,b:x})', "a=bool('maybe')", 'a=foo(1)', 'a=${b.c}', "a='${b.c}'", 'a=\\${b.c}',
 "a='\\${b.c}'", 'a=x${b.c}y', 'a=${', 'a=${b.c', 'a=foo bar', 'a= foo ', 'a=foo\\,bar',
 'a=foo\\\\bar', 'a=C:\\dir', "a='C:\\\\dir'", "a='C:\\dir\\\\'", 'a=[a', 'a={a:1',
 'a={1:2,true:3,null:4,1.5:6}', 'a={a b:1}', "a={'q r':1}", 'a={${b.c}:1}', 'a=x#y', 'a=x!y',
 'a=ä', 'a=x;y', 'a=*', 'a=**/x-1.2', 'a=-', 'a=-x', 'a=--', 'a=+1', 'a=@', 'a=a@b', 'a=1-2',
 'a=1.2.3', 'a=1a', 'a=a1', 'a=[]', 'a={}', 'a=(1)', 'a=x<y', 'a=~x', 'a=x~', 'a=[[1,2],[3]]',
 'a=[\'a,b\',"c"]', 'm=3', 'n.x=3', 'n={x:3}', '+n.x=3', 'a.x=3', '+a.x=3', '=3', 'a', '+a', '++a',
 'a b=1', 'b.c.=1', '.a=1', 'b..c=1', 'a=sort(3,1,2)', 'a=sort([3,1,2])',
 'a=sort([3,1,2],reverse=true)', 'a=shuffle([1])', 'a=range(1,4)', 'a=interval(1,2)',
 'a=extend_list(3)', 'b.d=extend_list(3,4)', 'b.d=append(3)', 'b.d=prepend(3)',
 'a=tag(x,choice(1,2))', 'a=glob(*)', 'a=int(choice(1.0,2.0))', "a='a','b'", "a='a'b", "a=b'c'",
 'a=$x', 'a=a$', 'a=%x', 'a=a|b?', 'a={a:b:c}', 'a=[a:b]', 'a=[a=b]', 'a=[1,]', 'a=,', 'a=1,',
 'a=a\\=b', 'a=\\ x', 'a=x\\ ', 'a=\\n', "a='\\n'", "a='a\\\\nb'", 'a=\tx']

# Nested lists, interpolations, null and mandatory values.
TREE = "a: {x: 1, y: {z: [1,{w: 2}]}}\nn: null\ni: ${a}\nl: [1,2,{k: 3}]\nm: ???\nk-1: 4\n'5': 6\n"
# of TREE
TREE_OVERRIDES = ['i.x=5', '+i.q=5', 'i={x:3}', 'i.y.z=1', 'i=3', 'l.2.k=9', 'l.2={k:9}', 'l.2={j:9}', '+l.2.j=9',
 'l.0={x:1}', 'a.y.z.1.w=3', 'k-1=3', '5=3', 'a={}', 'a={x:2,y:{z:3}}', 'a.y=null', 'a.y=[1]',
 'm={x:1}', '+m=3', '+m={x:1}', 'm.x=1', '+m.x=1', '+n=3', '+n={x:1}', '+a={x:5}', '+a={y:{q:1}}',
 '+a.y={q:1}', '+l=[3]', '+l={a:1}', '+a=3', '++a=3', '++a={x:{j:1}}', '++a.y={z:1,n:2}',
 '++l=[5]', '++l.0=6', '~a.x', '~a.y.z', '~l.0', '~l.2', '~l.2.k', '~m', '~m=???', '~n', '~n=null',
 '~i', '~i.x', '~a={}', '~a.x=1.0', "~a.x='1'", '~a.x=null', '~a.', '~', '~=1', '~a=', 'a={b:1}',
 'a={x:${n}}', '+q={a:{b:[1,{c:2}]},d:${a.x}}', 'a.x={p:1,p:2}', '+q={a:1,A:2}', "a.x='???'",
 'a.x=???', '+q.???=1', 'a.x=[???]', '+a.y.z.w=1', '+n.a.b=1', '+a.x.y.z=1', '+l.x=1', 'l.x=1',
 'l.-1=4', 'i.y={z:5}', '+q/r=1', 'q/r=1', 'a@b=1', 'a.x@b=1', '+a@b=1', '~a@b', '$a=1', '+$a=1',
 '+_x-y$z=1', 'a.$x=1', 'a.0=1', '+a.0=1', '+0=1', '+0.a=1', '+a.1x=1', '+x1=1', '+1x=1',
 '+x.01=1', '+q=a/b', '+q=/a/b.c', '+q=a b:c', '+q=a:b c', '+q= a : b ',
 '+q={ a : b c , d : [ 1 , 2 ] }', '+q=[ ]', '+q={ }', '+q=  ', "+q='  '", '+q=""', '+q="a\'b"',
 '+q=\'a"b\'', "+q='a\\\\'", "+q='\\\\\\'a'", '+q="\\\\\\""', "+q='a", '+q=1 2', '+q=1 ',
 '+q=true x', '+q=null x', '+q=nullx', '+q=truex', '+q=1_', '+q=1__0', '+q=00', '+q=-0',
 '+q=+1.5e+3', '+q=1e', '+q=e1', '+q=1.e3', '+q=.e3', '+q=1_0.2_5', '+q=infx', '+q=i', '+q=nan',
 '+q=+inf', '+q=\\,', '+q=\\:', '+q=\\(x\\)', '+q=x\\ty', '+q=\\\\\\\\', '+q=\\[1\\]', '+q=\\{',
 "+q=\\'", '+q=\\"', '+q={a:}', '+q={a}', '+q={:1}', '+q={a:1,}', '+q={a=1}', '+q={a:\'x\',b:"y"}',
 '+q={/a.b:1}', '+q={-1:2}', '+q={1.5:2}', '+q={true:2}', '+q={ a b :1}', '+q={null:1}',
 '+q={a\\:b:1}', '+q=[a b, c]', '+q=[a\\,b]', '+q=[{a:[1]}]', '+q=f(x)', '+q=int(x)',
 '+q=int(1e3)', '+q=int(null)', '+q=int(true)', '+q=int(1,2)', "+q=float('1e3')", '+q=float(x)',
 '+q=float(true)', '+q=str(1.50)', '+q=str(true)', '+q=str(null)', "+q=str('a b')", '+q=str(1e3)',
 '+q=bool(0)', '+q=bool(2.5)', '+q=bool(null)', "+q=bool('false')", '+q=bool(TRUE)',
 "+q=int('1_0')", "+q=int(' 12 ')", '+q=int(-1.7)', '+q=int(inf)', '+q=int(nan)', '+q=float(null)',
 '+q=int(${a.x})', '+q=str(${a.x})', '+q=sort([b,a])', '+q=sort([])', '+q=sort()',
 '+q=sort([1,a])', '+q=sort(1)', '+q=sort([1,2],true)', '+q=int()', '+q=int(value=3)',
 '+q=int(v=3)', '+q=shuffle(list=[1])', '+q=shuffle(1)', '+q=[int(3.5),str(1)]', '+q={a:int(3.5)}',
 '+q=choice(1)', "+q=int(int('3'))", '+q=int (3)', '+q=int( 3 )', '+q=int(3) ', '+q=[choice(1,2)]',
 '+q=a(', '+q=a)', '+q=]', '+q=}', '+q=:', '+q=::', '+q=a:', '+q=:a', '+q=${a.x} ',
 '+q=${oc.env:HOME}/x', '+q=${oc.env:HOME,a,b}', '+q=[${a.x},${l}]', '+q=${a.${n}}', '+q=${a',
 '+q=${}', '+q=${:}', '+q="${a.x}"', '+q=\'${oc.env:X,"q"}\'', "+q=${oc.env:X,'q r'}",
 '+q={a:${a.x}}', '+q=${a.x}${a.x}', '+q=1${a.x}', '+q=bool([true,false])', '+q=int(${a.x},1)',
 '+a.x=1', '+a.w=1 ', 'a. x=1', 'a =1', ' a.x=1', 'a.x =1']

# Strings with interpolations, each the value of `tt` in this tree.
TEXT_TREE = "b: 4\nk: x\nn: null\nf: 1e-7\nt: true\nm:\n  x: 1\n  y: ['${b}', a]\n  z: ${..b}\ntt: "
# of TEXT_TREE
TEXTS = ['${.}', '${..}', '${..a.b[c].d}', '${[a]}', '${a[b]c}', '${a.[b]}', '${a..b}', '${.a[0]}',
 '${a:b:c}', '${a:}', '${a:,}', '${a:,,b}', '${a: b , c }', '${a:[,]}', '${a:{b}}', '${a.b.c:d}',
 '${.a:b}', '${${a}:b}', '${${a}.b:c}', "${a:'x}", "${a:'x'y}", "${a:x'y'}", '${a:${}}',
 '${a:\\}}', '${a:\\,}', '${a:b\\}', 'x${a}\\', '\\\\', '${a:b=c}', '${a:~}', '${a:b#c}',
 '${a:"${b}"}', "${a:'${b'}", "${a:'\\${b'}", '${a:{x:1,2:3,1.5:4,true:5}}', '${a:{null:5}}',
 "${a:{'x':5}}", '${a:{${b}:5}}', '${a:(b)}', '${a-b:c}', '${1a:c}', '${a1.2b}', '${ a . b }',
 '${a .b}', '${a\tb}', "${a'b}", '${a\\b}', '${a}}', '}${a}', '{${a}', '${a{b}', '${a(b)}',
 '${a,b}', '${a=b}', '${a#b~c}', '${a$b}', '${a:[1, 2 ]}', '${a: }', '${é}', '${a:é}', 'é${a}',
 '${_a:b}', '${a:b}c${d}', '${a:${b:${c:${d}}}}', '${a:[${b},{x:${c}}]}', '${a:1 2}', "${a: 'x' }",
 "${a:'x' }", '${a:  x}', '${  a}', '${a:b\n}', '${a\n}', '${a${b}}', '${${b}a}', '$${b}', 'x\\\\',
 'x${b}\\\\', '${b}\\${b}', '\\${b}\\', '\\\\\\\\${b}', '${oc.decode:"\'x\'"}',
 "${oc.decode:'[1,{a:${b}}]'}", '${oc.create:[,1]}', '${oc.create:[a,]}', '${oc.select:b , z}',
 "${oc.select:'b'}", '${oc.select:"n o",1}', '${oc.dict.keys:m}', '${oc.dict.values:m}', '${m}',
 '${m.y}', '${m.y.0}', 'x${m}', 'x${m.y}', '${oc.create:${m}}', "${oc.decode:'${b}'}",
 '${oc.decode:null}', "${oc.decode:''}", '${oc.env:PATHX,a:b}', '${oc.env:PATHX, a b }',
 '${oc.env:PATHX,"a ${b}"}', "${oc.env:PATHX,'${b}'}", '${oc.env:PATHX,true}',
 '${oc.env:PATHX,1.50}', '${oc.env:PATHX,{a:1}}', '${oc.env:${b}}', '${oc.env:1,2}',
 "${oc.deprecated:b,'old $OLD_KEY'}", '${oc.select:m.x}', '${oc.select:m.q,${nope}}', '${m[x]}',
 '${m.${k}}', '${.b}', '${.m.x}', '${m.z}', '${oc.select:.b}', '${oc.select:..b}',
 '${oc.create:{a:{b:[1,x]}}}', '${oc.create:{a:${.b}}}', '${b}${m.x}', '${n}', 'x${n}', '${f}',
 'x${f}', '${t}${t}', '${oc.create:[1.0,1e20,1e-7]}',
 'x${oc.create:[1.0,1e20,1e-7,\'it\'\'s\',"q\'"]}']

# Whole files.
DOCUMENTS = ['# @package foo\na: 1\n', '- 1\n- 2\n', '', '3\n', 'a: 1\na: 2\n',
 'x: &q {a: 1}\ny: {<<: *q, b: 2}\n',
 'x: &q {a: 1, b: 1}\nz: &r {c: 1}\ny: {b: 2, <<: [*q, *r]}\n', '--- {a: 1}\n--- {b: 1}\n',
 'a: =\n', '? [1,2]\n: 3\n', '1: a\n1.5: b\ntrue: c\nnull: d\n', 'a: !!python/name:os.system\n',
 "a: !!str 1\nb: !!int '3'\nc: !foo x\n",
 "a: !!str 1\nb: !!int '3'\nc: !!float 3\nd: !!null ''\ne: !!bool 'yes'\n", 'a: !!set {x}\n',
 'a: !!timestamp 2020-01-01\n', 'a: !!float x\n', 'a: 1\nb: ${a}', 'a: {x: 1}\nb: ${a}\nc: ${a.x}',
 "a: {x: 1, y: '${.x}', z: {q: '${..x}', w: '${.q}'}}", "a: [1,'${.0}','${..b}']\nb: 5",
 'a: x\nb: p_${a}_q', 'a: 1.0\nb: v${a}', 'a: true\nb: v${a}', 'a: null\nb: v${a}',
 'a: [1,x,null]\nb: v${a}', "a: {k: 'v', q: true}\nb: v${a}", 'a: 1\nb: \\${a}',
 'a: 1\nb: \\\\${a}', 'a: 1\nb: \\\\\\${a}x', "a: 1\nb: 'x\\y ${a}'", 'a: b\nb: 3\nc: ${${a}}',
 'a: b\nx: {b: 3}\nc: ${x.${a}}\nd: ${x[b]}\ne: ${x[${a}]}', 'a: ${b}', 'a: ${b}\nb: ${a}',
 'a: ${a}', 'a: ???\nb: ${a}', 'a: ???\nb: x${a}', 'a: ${oc.env:HCE}', 'a: ${oc.env:NOPE}',
 'a: ${oc.env:NOPE,3}', 'a: ${oc.env:NOPE,null}', "a: ${oc.env:NOPE,''}",
 'a: ${oc.env:NOPE,[1,2]}', 'a: ${oc.env:NOPE,${b}}\nb: 4', 'a: ${oc.decode:${oc.env:HCE}}',
 'a: ${oc.decode:${oc.env:HCL}}', "a: ${oc.decode:'{a:1}'}", 'a: ${oc.decode:null}',
 'a: ${oc.decode:${oc.env:HCN}}', 'a: ${oc.decode:abc def}', "a: ${oc.decode:'1,2'}",
 'a: ${oc.decode:3}', 'a: ${oc.select:b}\nb: 4', 'a: ${oc.select:c}\nb: 4',
 'a: ${oc.select:c,7}\nb: 4', 'a: ${oc.select:m,7}\nm: ???', 'a: ${oc.select:n,7}\nn: null',
 "a: {b: '${oc.select:.c,8}', c: 4}", 'a: ${oc.create:{x:1,y:[1,2]}}', 'a: ${oc.create:[1,2]}',
 'a: ${oc.create:3}', 'a: ${oc.deprecated:b}\nb: 4', 'a: ${oc.deprecated:zz}\nb: 4',
 'a: ${oc.dict.keys:b}\nb: {x: 1, y: 2}', 'a: ${oc.dict.values:b}\nb: {x: 1, y: [2]}',
 "a: ${oc.dict.values:.b}\nb: {x: 1, y: '${..a2}'}\na2: 3", 'a: ${oc.dict.keys:{x:1}}',
 'a: ${oc.dict.keys:${b}}\nb: {x: 1}', 'a: ${oc.dict.keys:b}\nb: 3', 'a: ${nope:1}',
 'a: ${oc.env:}', 'a: ${}', 'a: ${ }', 'a: ${b', 'a: $b', 'a: ${ b }\nb: 1', "a: '${b c}'",
 'a: ${b-c}\nb-c: 2', 'a: ${b.1}\nb: [4,5]', 'a: ${b[1]}\nb: [4,5]', 'a: ${b[-1]}\nb: [4,5]',
 'a: ${b.9}\nb: [4,5]', 'a: ${b.c.d}\nb: {c: 3}', 'a: ${b.c}\nb: ${d}\nd: {c: 9}',
 "a: '${oc.env:HCE}x${oc.env:HCE}'",
 "a: '${oc.create:{x: a b, y: 1.5, z: true, w: null, 1: 2, ''q'': 3}}'",
 'a: \'${oc.create:{x: \'\'it\'\', y: "q ${b}", z: x${b}y}}\'\nb: 3',
 'a: ${oc.create:[a:b, c/d, x@y, ~, -]}', 'a: ${oc.create:[a=b]}',
 'a: ${oc.create:[1e3,.5,0x1,1_0,yes,on,True,NULL,nan]}', 'a: ${.b}\nb: 3', 'a: ${..b}\nb: 3',
 "x: {a: '${...b}'}\nb: 3", 'a: {b: ${.c}, c: ${oc.select:..d}}\nd: 3', 'a: ${oc.env:HCE,}',
 'a: ${oc.env: HCE }', 'a: ${oc.env:HCE,1,2}', 'a: ${oc.select:b,}\n', 'a: ${a b}',
 'a: ${oc.decode:[}', 'a: ${oc.decode:a=b}', "a: ${oc.decode:${b}}\nb: '${c}'\nc: 3",
 "a: ${oc.decode:'$''{c}'}\nc: 3", "a: ${oc.decode:'\\${c}'}\nc: 3", "a: 'x ${oc.create:{a:1}} y'",
 "a: ${x.y}\nx: {y: {z: '${..w}', w: 1}, w: 5}", "a: ${b}\nb: [1,'${c}']\nc: 4",
 "a: 1\nb: '${a'\n", "a: 'a}b{'", "a: 1\nb: '${a}}'", "a: '{${b}}'\nb: 1", 'a: "it\'s ${b}"\nb: 1',
 " a: '''${b}'''\nb: 1", 'a: ${oc.dict.values:b.c}\nb: {c: {d: 3}}',
 'a: ${oc.dict.keys:b}\nb: ???', 'a: ${b}\nb: {c: ???}', 'a: ${b.c}\nb: {c: ???}',
 'a: {b: ???, c: ${.b}}', 'a: ${b}\nb: x???', "a: 'x ???'", 'a: ${oc.env:HCE,${nope}}',
 'a: ${oc.env:NOPE,${nope}}', 'a: ${b.true}\nb: {true: 3}', 'a: ${b.1}\nb: {1: 3}',
 "a: ${b.1}\nb: {'1': 3}", "a: ${b.null}\nb: {'null': 3}", 'a: ${b.c d}\nb: {c d: 3}',
 "a: ${'b'}\nb: 1", 'a: ${b:c}', 'a: ${b/c}\nb/c: 3', 'a: ${b@c}\nb@c: 3', 'a: ${b!}\nb!: 3',
 'a: ${b_c$}\nb_c$: 2', "1: a\n'1': b", 'a: {null: 1}',
 'a: 1_000\n'
 'b: 0o17\n'
 'c: 017\n'
 'd: 0x1F\n'
 'e: 0b11\n'
 'f: 1:30\n'
 'g: 1:30.5\n'
 'h: 1e3\n'
 'i: 1.e3\n'
 'j: .5\n'
 'k: 5.\n'
 'l: .inf\n'
 'm: -.INF\n'
 'n: .nan\n'
 'o: 1e\n'
 'p: 08\n'
 'q: 2020-01-01\n'
 'r: 2020-01-01 10:00:00\n'
 's: y\n'
 't: N\n'
 'u: Yes\n'
 'v: OFF\n'
 'w: ~\n'
 'x: Null\n'
 'z: nULL\n'
 'aa: +1\n'
 'ab: -0\n'
 'ac: 1.5e3\n'
 'ad: 1.5E-3\n'
 'ae: +.5\n'
 'af: 1_0.5\n'
 'ag: _1\n'
 'ah: 1__0\n'
 'ai: 1e+3\n'
 'aj: 1_0e3\n'
 'ak: 0_\n'
 'al: -1:30\n'
 'am: 1:60\n'
 'an: 0:30\n'
 'ao: .5e3\n'
 'ap: .5e+3\n'
 "aq: ''\n"
 'ar: |\n'
 '  x\n'
 'as: 1.2.3\n'
 'at: 2:4\n'
 'au: [2:4, 1e3]\n'
 'av: {a: 2:4}\n'
 'aw: 0x\n'
 'ax: 0b\n'
 "ay: '1'\n"
 'az: "1"\n'
 'ba: inf\n'
 'bb: +.inf\n'
 'bc: .NaN\n'
 'bd: 1.\n'
 'be: -1.\n'
 'bf: 12e03\n'
 'bg: 0.1\n'
 'bh: 00\n'
 'bi: 0777\n'
 'bj: -0x1f\n'
 'bk: 0xG\n'
 'bl: true \n'
 'bm: TRUE\n'
 'bn: tRue\n'
 'bo: 1_\n'
 'bp: 1.5_0\n'
 'bq: 1:2:3\n'
 'br: 190:20:30.15',
 'a: 0x_', 'a: 0b_', 'a: {x: 1}\nb: {<<: {x: 2}, y: 1}', 'a: &x [1]\nb: *x', 'a: {<<: 3}',
 'a: {<<: [3]}', 'a: *x', 'a: &x {b: *x}', '<<: {a: 1}\nb: 2', 'a: {x: 1, <<: {x: 2}}',
 'a: {<<: {x: 1}, <<: {y: 2}}', "a: {'<<': {x: 1}}", 'a: b: c', "a: 'x' y", 'a: [1, 2', 'a: {b:1}',
 'a: [b:c]', 'a:\n\tb: 1', 'a: "\\x41\\u00e9\\n"', 'a: >\n  x\n  y\n', 'a: @x', 'a: `x`', 'a: %x',
 'a: -', 'a: - x', 'a: ?', 'a: x # c', 'a: x#c', "a: 'it''s'", '%YAML 1.2\n---\na: 1',
 '---\na: 1\n...', 'a: !!seq [1]', 'a: !!map {x: 1}', '{a: 1, b}', 'a: [,]', 'a: {b: 1, b: 2}',
 'a: 1\n b: 2', '? a\n: b', '? {x: 1}\n: b', "a: |-\n  x\nb: 'multi\n  line'", '\ufeffa: 1',
 'a: "\\z"', 'a.b: 3\nc: ${a.b}', 'a: [1,2,]', 'a: !!int x', 'a: !!bool x', 'a: !!null x',
 'a: !!float 1:30', '\'a\': 1\n"b": 2', 'a: 1 \n#x\nb: 2', 'yes: 1\nNo: 2', '1e3: 2', '~: 2',
 'a: .', 'a: ..', 'a: ._1', 'a: 1,000', 'defaults:\n  - _self_\na: 1', 'a: ${b\n',
 "a: '${oc.env:}'", "a: '${x:y:z}'", "a: '${b.}'", "a: 'x${'", "a: '${a}${'", '_a: 1', "a: '\\\\'",
 "a: 'x\\${b'", "a: '$${b}'\nb: 1", 'a: {b: ${.c}}', 'a: [1,,2]', 'a: [,1]', 'a: [1, 2, ]',
 'a: é\nb: [ü, ~, é]\nc: [é, ü,,]', 'a: [null, ~]', 'a: {x, y}', "a: [{}, [], '']", 'a: [x: 1, y]',
 '- \n', 'a: [~,null,]\nb:\n  -\n  - 1\n', '1__0.5: a',
 'a: 1__0.5\n'
 'b: 1__0e5\n'
 'c: 1_._5\n'
 'd: 1.5e3_0\n'
 'e: 1_:30.5\n'
 'f: 1:2_0\n'
 'g: 0.0000001\n'
 'h: 1e22\n'
 'i: 123456789012345680.0\n'
 'j: 1e16\n'
 'k: -0.0\n'
 'l: 1e400\n'
 'm: 4.9e-324']
